"""Quality against fp32: agreement of the best tokens and change of NLL, position by position."""

from __future__ import annotations

import pytest

from tests.benchmarks.quality import compare


def test_agreement_and_change_of_nll() -> None:
    reference = [{"logprobs": [-1.0, -2.0], "best": [5, 6]}, {"logprobs": [-3.0, -4.0], "best": [7, 8]}]
    worse = [{"logprobs": [-1.5, -2.5], "best": [5, 6]}, {"logprobs": [-3.5, -4.5], "best": [7, 9]}]
    found = compare(worse, reference)
    assert (found.num_tokens, found.same_best, found.nll) == (4, 0.75, 3.0)
    assert (found.nll_change, found.nll_change_error) == pytest.approx((0.5, 0.0))


def test_other_positions_than_the_reference_are_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        compare([{"logprobs": [-1.0], "best": [1]}], [{"logprobs": [-1.0, -1.0], "best": [1, 1]}])

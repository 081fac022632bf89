"""Rows that few random ones are like: what the filters know of tokens beyond the candidates, each way of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.generation import SamplingParams
from tests.reference_sampling import processors_of
from worker.engine.filters import Filters, filter_candidates, is_unfiltered

CPU = torch.device("cpu")
PROBS = {
    "sharp": [0.9] + [0.1 / 299] * 299,
    "blunt": [0.4] + [0.6 / 299] * 299,  # the most probable token is less typical than what lies beyond candidates
    "pair": [0.5, 0.3] + [0.2 / 298] * 298,
    "slope": [1 / 300 + (150 - i) * 1e-6 for i in range(300)],
    "twins": [0.5, 0.5],
}


def kept_by_transformers(scores: torch.Tensor, params: SamplingParams) -> set[int]:
    left = processors_of(params, [0])(torch.tensor([[0]]), scores)
    return set(left[0].isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("name", "num_candidates", "params", "is_known"),
    [
        ("sharp", 10, {"typical_p": 0.5}, True),
        ("blunt", 10, {"typical_p": 0.3}, False),
        ("blunt", 10, {"typical_p": 0.3, "epsilon_cutoff": 0.1}, False),
        ("blunt", 300, {"typical_p": 0.3, "epsilon_cutoff": 0.1}, True),
        ("pair", 10, {"typical_p": 0.95}, False),
        ("pair", 10, {"typical_p": 0.2}, True),
        ("slope", 10, {"eta_cutoff": 0.2}, False),
        ("slope", 300, {"eta_cutoff": 0.2}, True),
        ("sharp", 10, {"eta_cutoff": 0.2}, True),
        ("twins", 2, {"top_h": 1.0}, True),
        ("twins", 2, {"top_h": 0.9}, True),
    ],
)
def test_a_row_is_known_where_nothing_beyond_the_candidates_can_stay(
    name: str, num_candidates: int, params: dict[str, Any], is_known: bool
) -> None:
    scores = torch.tensor([PROBS[name]]).log()
    sampling = SamplingParams(max_tokens=1, temperature=1.0, **params)
    top, ids = scores.topk(num_candidates)
    keep, complete = filter_candidates(scores, top.double(), Filters.of([sampling], CPU))
    assert bool(complete[0]) == is_known
    if is_known:
        assert set(ids[0][keep[0]].tolist()) == kept_by_transformers(scores, sampling)
    else:
        assert kept_by_transformers(scores, sampling) - set(ids[0].tolist()), "it could have been known"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 1), ("top_p", 0.99), ("min_p", 0.01), ("top_h", 0.5), ("typical_p", 0.9), ("epsilon_cutoff", 1e-5),
        ("eta_cutoff", 1e-5),
    ],
)  # fmt: skip
def test_each_filter_alone_is_one(name: str, value: float) -> None:
    assert is_unfiltered(SamplingParams(max_tokens=1, temperature=1.0))
    assert not is_unfiltered(SamplingParams(max_tokens=1, temperature=1.0, **{name: value}))  # type: ignore[arg-type]

"""Joined deltas say what the single ones said."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from common.deltas import merge_deltas, merge_scores
from common.generation import FinishReason, OutputDelta, PromptScores


def deltas_of(rng: random.Random, num_outputs: int, count: int) -> list[OutputDelta]:
    """Deltas of several outputs in turn, each output's without a gap."""
    lengths = [0] * num_outputs
    found = []
    for _ in range(count):
        index = rng.randrange(num_outputs)
        ids = tuple(rng.randrange(100) for _ in range(rng.randrange(3)))
        found.append(
            OutputDelta(
                index,
                lengths[index],
                ids,
                "x" * rng.randrange(3),
                tuple(-1.0 * n for n in ids),
                top_logprobs=tuple(((n, -1.0 * n),) for n in ids),
                ranks=tuple(n + 1 for n in ids),
            )
        )
        lengths[index] += len(ids)
    return found


@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(0, 20))
def test_nothing_is_lost_or_moved(rng: random.Random, num_outputs: int, count: int) -> None:
    deltas = deltas_of(rng, num_outputs, count)
    merged = merge_deltas(deltas)
    order = list(dict.fromkeys(delta.output_index for delta in deltas))
    assert [delta.output_index for delta in merged] == order
    for delta in merged:
        own = [part for part in deltas if part.output_index == delta.output_index]
        assert delta.first_token_index == own[0].first_token_index
        assert delta.token_ids == sum((part.token_ids for part in own), ())
        assert delta.logprobs == sum((part.logprobs for part in own), ())
        assert delta.top_logprobs == sum((part.top_logprobs for part in own), ())
        assert delta.ranks == sum((part.ranks for part in own), ())
        assert delta.text == "".join(part.text for part in own)
    assert merge_deltas(merged) == merged


def test_the_end_is_the_last_one_s() -> None:
    first = OutputDelta(0, 0, (1,), "a")
    last = OutputDelta(0, 1, (2,), "", finish_reason=FinishReason.STOP, stop_match="b", score=-0.5)
    assert merge_deltas([first, last]) == [
        OutputDelta(0, 0, (1, 2), "a", finish_reason=FinishReason.STOP, stop_match="b", score=-0.5)
    ]


def test_scores_of_a_prompt_join_in_order() -> None:
    first = PromptScores(1, (-1.0, -2.0), (1, 2), (((3, -1.0),), ((4, -2.0),)))
    last = PromptScores(3, (-3.0,), (7,), (((5, -3.0),),))
    assert merge_scores([None, first, None, last]) == PromptScores(
        1, (-1.0, -2.0, -3.0), (1, 2, 7), (((3, -1.0),), ((4, -2.0),), ((5, -3.0),))
    )
    assert merge_scores([None]) is None


def test_a_single_delta_is_passed_on() -> None:
    delta = OutputDelta(0, 3, (1,), "a")
    assert merge_deltas([delta])[0] is delta

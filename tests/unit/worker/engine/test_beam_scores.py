"""Continuations of beams, against transformers' own processors over the whole vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitNormalization

from common.generation import SamplingParams
from tests.builders_engine import make_sequence
from tests.parity.cases import combinations
from tests.reference_sampling import processors_of
from worker.engine.beam_scores import best_continuations
from worker.engine.sequence import Sequence

VOCAB = 48


def make_beam(prompt: tuple[int, ...], output: tuple[int, ...], **fields: Any) -> Sequence:
    return Sequence("r", prompt, SamplingParams(**{"max_tokens": 30, "num_beams": 2, **fields}), emitted=output)


def expected(beam: Sequence, logits: torch.Tensor, total: float) -> dict[int, float]:
    """The sum of each token that may come."""
    prompt = beam.token_ids[: beam.num_prompt_tokens].tolist()
    tokens = torch.tensor([beam.token_ids.tolist()])
    scores = processors_of(beam.sampling, prompt)(tokens, logits[None].log_softmax(-1))
    if beam.sampling.renormalize_logits:
        scores = LogitNormalization()(tokens, scores)
    return {token: value for token, value in enumerate((scores[0] + total).tolist()) if value > -math.inf}


@settings(max_examples=25, deadline=None)
@given(
    batch=combinations(VOCAB, num_requests=5, longest=12),
    again=st.lists(st.booleans(), min_size=5, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_each_beam_has_the_sums_of_transformers_processors(batch: list[Any], again: list[bool], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    beams = []
    for case, renormalize in zip(batch, again, strict=True):
        output = tuple(torch.randint(3, VOCAB, (7,), generator=generator).tolist())
        fields = {name: getattr(case.params, name) for name in case.params.__struct_fields__ if name != "num_beams"}
        beams.append(make_beam(case.prompt, output, **{**fields, "renormalize_logits": renormalize}))
    logits = torch.randn(5, VOCAB, generator=generator) * 3
    before = logits.clone()
    totals = [-float(i) for i in range(5)]
    found = best_continuations(logits, beams, totals, num_best=VOCAB)
    assert torch.equal(logits, before)
    for beam, row, total, best in zip(beams, logits, totals, found, strict=True):
        wanted = expected(beam, row, total)
        possible = {token: value for value, token in best if value > -math.inf}
        assert possible == pytest.approx(wanted, abs=1e-3)
        assert [value for value, _ in best] == sorted((value for value, _ in best), reverse=True)


@pytest.mark.parametrize("fields", [{}, {"suppress_tokens": (3,)}])
def test_only_as_many_as_asked_for_come_and_no_more_than_there_are(fields: dict[str, Any]) -> None:
    beams = [make_beam((4, 5), (), **fields), make_beam((4, 5), (6,))]
    logits = torch.arange(2 * VOCAB).reshape(2, VOCAB).bfloat16()
    assert [len(best) for best in best_continuations(logits, beams, [0.0, -1.0], 5)] == [5, 5]
    assert [len(best) for best in best_continuations(logits, beams, [0.0, -1.0], 500)] == [VOCAB, VOCAB]
    assert best_continuations(logits, beams, [0.0, -1.0], 1)[0][0][1] == VOCAB - 1


def test_without_edits_as_with_edits_that_do_nothing() -> None:
    logits = torch.randn(1, VOCAB)
    (plain,) = best_continuations(logits, [make_sequence()], [-2.0], 6)
    (edited,) = best_continuations(logits, [make_beam((4,), (), sequence_bias=(((1, 2, 3), 1.0),))], [-2.0], 6)
    assert [token for _, token in plain] == [token for _, token in edited]
    assert [value for value, _ in plain] == pytest.approx([value for value, _ in edited], abs=1e-5)


def test_a_row_that_allows_nothing_has_no_numbers_that_compare_with_others() -> None:
    beam = make_beam((4,), (), suppress_tokens=tuple(range(VOCAB)), renormalize_logits=True)
    (best,) = best_continuations(torch.randn(1, VOCAB), [beam], [0.0], 4)
    assert {value for value, _ in best} == {-math.inf}

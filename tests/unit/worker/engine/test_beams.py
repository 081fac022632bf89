"""The search by itself, against transformers' own functions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationMixin

from common.generation import EarlyStopping, SamplingParams
from worker.engine.beams import BeamSearch, Candidate, Hypothesis, best_candidates, num_candidates

THEIRS: dict[EarlyStopping, bool | str] = {
    EarlyStopping.HEURISTIC: False,
    EarlyStopping.WHEN_FULL: True,
    EarlyStopping.NEVER: "never",
}


def log_probs(seed: int, tokens: tuple[int, ...], vocab_size: int) -> torch.Tensor:
    """[vocab_size] float32; no two alike."""
    rng = random.Random(f"{seed} {tokens}")
    return torch.tensor([rng.gauss(0, 2) for _ in range(vocab_size)], dtype=torch.float32).log_softmax(-1)


def searched(seed: int, params: SamplingParams, vocab_size: int) -> Iterator[BeamSearch]:
    """Our search, step by step."""
    search, outputs = BeamSearch(params), [()]
    while not search.is_done:
        table = [
            (torch.tensor(score) + log_probs(seed, tokens, vocab_size)).tolist()
            for score, tokens in zip(search.scores, outputs, strict=True)
        ]
        candidates = best_candidates(
            (Candidate(total, beam, token) for beam, row in enumerate(table) for token, total in enumerate(row)), params
        )
        ended = [
            c.token_id in params.stop_token_ids or len(outputs[c.beam]) + 1 == params.max_tokens for c in candidates
        ]
        going = search.advance(candidates, ended, outputs)
        outputs = [(*outputs[candidate.beam], candidate.token_id) for candidate in going]
        yield search


def transformers_search(
    seed: int, params: SamplingParams, vocab_size: int
) -> tuple[list[tuple[int, ...]], list[float]]:
    """The loop of `_beam_search` over transformers' own functions, behind a prompt of one token."""
    mixin: Any = GenerationMixin()
    beams, most = params.num_beams, params.max_tokens
    early_stopping = THEIRS[params.early_stopping]
    keep = max(2, 1 + len(params.stop_token_ids)) * beams
    mask = torch.arange(keep) < beams
    running = torch.zeros((1, beams, 1 + most), dtype=torch.int64)
    sequences = running.clone()
    running_scores = torch.zeros(1, beams)
    running_scores[:, 1:] = -1e9
    scores = torch.full((1, beams), -1e9)
    is_finished = torch.zeros((1, beams), dtype=torch.bool)
    may_improve = torch.ones((1, 1), dtype=torch.bool)
    running_indices = torch.full((1, beams, most), -1, dtype=torch.int32)
    indices = running_indices.clone()
    length = 1
    while True:
        rows = [log_probs(seed, tuple(running[0, beam, 1:length].tolist()), vocab_size) for beam in range(beams)]
        totals = (torch.stack(rows)[None] + running_scores[:, :, None]).reshape(1, -1)
        best, best_sequences, best_indices = mixin._get_top_k_continuations(
            totals, running, running_indices, length, 1, False, keep, beams, 1
        )
        hits = torch.isin(best_sequences[:, :, length], torch.tensor(params.stop_token_ids, dtype=torch.int64))
        hits |= length == most
        running, running_scores, running_indices = mixin._get_running_beams_for_next_iteration(
            best, best_sequences, best_indices, hits, beams
        )
        sequences, scores, indices, is_finished = mixin._update_finished_beams(
            sequences, best_sequences, scores, best, indices, best_indices, may_improve, is_finished, hits, mask,
            beams, length, 1, params.length_penalty, early_stopping,
        )  # fmt: skip
        length += 1
        may_improve = mixin._check_early_stop_heuristic(
            may_improve, running_scores, scores, is_finished, length, 1 + most, 1, early_stopping, params.length_penalty
        )
        if not mixin._beam_search_has_unfinished_sequences(may_improve, is_finished, hits, early_stopping):
            break
    lengths = (indices[0] >= 0).sum(-1).tolist()
    return [tuple(sequences[0, i, 1 : 1 + n].tolist()) for i, n in enumerate(lengths)], scores[0].tolist()


@st.composite
def searches(draw: st.DrawFn) -> tuple[int, SamplingParams, int]:
    num_beams = draw(st.integers(2, 6))
    num_ends = draw(st.integers(0, 4))
    # So large that the first step has as many candidates as transformers wants: it fills up with copies.
    vocab_size = draw(st.integers(max(2, 1 + num_ends) * num_beams, 40))
    params = SamplingParams(
        max_tokens=draw(st.integers(1, 14)),
        num_beams=num_beams,
        length_penalty=draw(st.sampled_from([-2.0, -1.0, -0.3, 0.0, 0.6, 1.0, 2.0])),
        early_stopping=draw(st.sampled_from(EarlyStopping)),
        stop_token_ids=tuple(range(num_ends)),
    )
    return draw(st.integers(0, 2**32)), params, vocab_size


@settings(max_examples=150, deadline=None)
@given(searches())
def test_the_search_ends_where_transformers_does_with_the_same_sequences_and_scores(
    drawn: tuple[int, SamplingParams, int],
) -> None:
    *_, last = searched(*drawn)
    sequences, scores = transformers_search(*drawn)
    assert [found.token_ids for found in last.finished] == sequences
    assert [found.score for found in last.finished] == scores  # both float32


@settings(max_examples=50, deadline=None)
@given(searches())
def test_one_that_is_cut_gives_the_best_of_all_it_has(drawn: tuple[int, SamplingParams, int]) -> None:
    for search in searched(*drawn):
        if search.is_done:
            continue
        outputs = [(7,) * search.num_tokens for _ in search.scores]
        cut = search.cut(outputs)
        every = [found.score for found in search.finished]
        every += [total / search.num_tokens ** drawn[1].length_penalty for total in search.scores]
        assert [found.score for found in cut] == pytest.approx(sorted(every, reverse=True)[: drawn[1].num_beams])
        assert search.cut([]) == list(search.finished)


def test_before_the_first_step_there_is_nothing_to_cut() -> None:
    assert BeamSearch(SamplingParams(max_tokens=3, num_beams=2)).cut([()]) == []


def test_what_is_not_allowed_is_no_candidate_and_equal_ones_come_in_order() -> None:
    params = SamplingParams(max_tokens=3, num_beams=2)
    found = [
        Candidate(-1.0, 1, 5),
        Candidate(-math.inf, 0, 9),
        Candidate(-1.0, 0, 8),
        Candidate(-0.5, 1, 3),
        Candidate(-1.0, 0, 7),
        Candidate(-3.0, 0, 1),
    ]
    assert [(c.beam, c.token_id) for c in best_candidates(found, params)] == [(1, 3), (0, 7), (0, 8), (1, 5)]


def test_without_enough_continuations_fewer_beams_go_on_and_none_end_the_search() -> None:
    search = BeamSearch(SamplingParams(max_tokens=5, num_beams=3, stop_token_ids=(1,)))
    going = search.advance([Candidate(-1.0, 0, 4), Candidate(-2.0, 0, 1)], [False, True], [()])
    assert (going, search.is_done) == ([Candidate(-1.0, 0, 4)], False)
    assert (search.advance([], [], [(4,)]), search.is_done) == ([], True)
    assert search.finished == [Hypothesis(-2.0, (1,))]


@pytest.mark.parametrize(("num_ends", "expected"), [(0, 6), (1, 6), (2, 9), (5, 18)])
def test_enough_go_on_however_many_end(num_ends: int, expected: int) -> None:
    assert num_candidates(SamplingParams(max_tokens=5, num_beams=3, stop_token_ids=tuple(range(num_ends)))) == expected


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "is_done"),
    [
        (EarlyStopping.WHEN_FULL, 1.0, True),
        (EarlyStopping.HEURISTIC, 1.0, True),
        (EarlyStopping.NEVER, 1.0, False),  # -5 over ten tokens would be better than -1.2
        (EarlyStopping.NEVER, 0.0, True),
    ],
)
def test_how_far_a_beam_may_still_come_decides(
    early_stopping: EarlyStopping, length_penalty: float, is_done: bool
) -> None:
    search = BeamSearch(
        SamplingParams(
            max_tokens=10,
            num_beams=2,
            stop_token_ids=(1, 2),
            early_stopping=early_stopping,
            length_penalty=length_penalty,
        )
    )
    candidates = [Candidate(-1.0, 0, 1), Candidate(-1.2, 0, 2), Candidate(-5.0, 0, 7)]
    search.advance(candidates, [True, True, False], [()])
    assert search.is_done is is_done


def test_ends_behind_the_best_candidates_are_not_taken() -> None:
    search = BeamSearch(SamplingParams(max_tokens=5, num_beams=2, stop_token_ids=(1,)))
    search.advance([Candidate(-1.0, 0, 4), Candidate(-2.0, 0, 5), Candidate(-2.5, 0, 1)], [False, False, True], [()])
    assert search.finished == []

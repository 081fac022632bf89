from __future__ import annotations

from common.generation import SamplingParams
from worker.engine.sequence import Sequence


def make(**fields: object) -> Sequence:
    return Sequence("r", [5, 6, 7], SamplingParams(max_tokens=4, repetition_penalty=1.5), **fields)  # type: ignore[arg-type]


def test_emitted_tokens_are_output_that_is_not_computed() -> None:
    sequence = make(emitted=[8, 9])
    assert (sequence.num_prompt_tokens, sequence.num_output_tokens, sequence.num_uncomputed_tokens) == (3, 2, 5)
    assert sequence.token_ids.tolist() == [5, 6, 7, 8, 9]


def test_a_new_token_enters_the_history_too() -> None:
    sequence = make(emitted=[8])
    sequence.append(9)
    assert sequence.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert sequence.history is not None
    assert sequence.history.seen_ids.tolist() == [5, 6, 7, 8, 9]


def test_sequences_without_penalties_keep_no_history() -> None:
    assert Sequence("r", [1], SamplingParams(max_tokens=4, temperature=1.0)).history is None


def test_order_is_priority_then_arrival_then_output() -> None:
    sequences = [
        make(priority=p, arrival=a, output_index=o) for p, a, o in [(1, 0, 0), (0, 2, 1), (0, 2, 0), (0, 1, 5)]
    ]
    ordered = sorted(sequences, key=lambda sequence: sequence.order)
    assert [s.order for s in ordered] == [(0, 1, 5), (0, 2, 0), (0, 2, 1), (1, 0, 0)]


def test_a_sequence_tells_where_it_stands() -> None:
    assert repr(make(emitted=[8])) == "Sequence('r'[0], 3+1 tokens, 0 computed, 0 blocks)"

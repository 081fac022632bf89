from __future__ import annotations

from array import array

import torch

from tests.builders_engine import make_sequence
from worker.engine.batch import BatchBuffers
from worker.engine.scheduler import Chunk, Plan
from worker.engine.sequence import Sequence

CPU = torch.device("cpu")


def placed(sequence: Sequence, num_computed_tokens: int, *block_ids: int) -> Sequence:
    sequence.num_computed_tokens = num_computed_tokens
    sequence.block_ids.extend(block_ids)
    return sequence


def make_buffers() -> BatchBuffers:
    return BatchBuffers(max_num_tokens=32, max_num_seqs=4, max_num_blocks=8, block_size=4, device=CPU)


def test_a_plan_is_packed_sequence_by_sequence() -> None:
    decode = placed(make_sequence(prompt=[10, 11, 12, 13, 14, 15]), 5, 7, 3)
    prefill = placed(make_sequence(prompt=list(range(20, 32))), 4, 2, 9, 5)
    chunks = (Chunk(decode, 1, is_last=True), Chunk(prefill, 6, is_last=False))
    batch = make_buffers().fill(Plan(chunks, 7))
    assert batch.input_ids.tolist() == [[15, 24, 25, 26, 27, 28, 29]]
    assert batch.position_ids.tolist() == [[5, 4, 5, 6, 7, 8, 9]]
    assert batch.logit_rows.tolist() == [0]
    attention = batch.attention
    assert attention.slots.tolist() == [3 * 4 + 1, *range(36, 40), 20, 21]
    assert attention.query_starts.tolist() == [0, 1, 7]
    assert attention.context_lens.tolist() == [6, 10]
    assert attention.block_tables[0, :2].tolist() == [7, 3]
    assert attention.block_tables[1, :3].tolist() == [2, 9, 5]
    assert attention.block_tables.is_contiguous()
    assert (attention.max_query_len, attention.max_context_len) == (6, 10)
    assert (attention.slots.dtype, attention.block_tables.dtype, batch.input_ids.dtype) == (
        torch.int32,
        torch.int32,
        torch.int64,
    )


def test_a_smaller_plan_reads_nothing_of_a_larger_one_before() -> None:
    buffers = make_buffers()
    large = placed(make_sequence(prompt=list(range(12))), 0, 4, 5, 6)
    buffers.fill(Plan((Chunk(large, 12, is_last=True),), 12))
    small = placed(make_sequence(prompt=[3, 4]), 0, 1)
    batch = buffers.fill(Plan((Chunk(small, 2, is_last=True),), 2))
    assert batch.input_ids.tolist() == [[3, 4]]
    assert batch.attention.slots.tolist() == [4, 5]
    assert batch.attention.block_tables.tolist() == [[1]]
    assert batch.logit_rows.tolist() == [1]


def test_blocks_given_beyond_the_step_are_left_out() -> None:
    sequence = placed(make_sequence(prompt=list(range(16))), 0, 1, 2, 3, 4)
    batch = make_buffers().fill(Plan((Chunk(sequence, 6, is_last=False),), 6))
    assert batch.attention.block_tables.tolist() == [[1, 2]]
    assert batch.logit_rows.tolist() == []


def test_drafts_stand_behind_their_sequences_last_token_and_all_their_logits_are_needed() -> None:
    decode = placed(make_sequence(prompt=[10, 11, 12, 13, 14, 15]), 5, 7, 3)
    prefill = placed(make_sequence(prompt=[20, 21, 22]), 0, 2)
    chunks = (Chunk(decode, 3, is_last=True, drafts=array("i", [31, 32])), Chunk(prefill, 3, is_last=True))
    plan = Plan(chunks, 6)
    batch = make_buffers().fill(plan)
    assert batch.input_ids.tolist() == [[15, 31, 32, 20, 21, 22]]
    assert batch.position_ids.tolist() == [[5, 6, 7, 0, 1, 2]]
    assert batch.logit_rows.tolist() == [0, 1, 2, 5]
    assert batch.attention.slots.tolist() == [13, 14, 15, 8, 9, 10]
    assert batch.attention.query_starts.tolist() == [0, 3, 6]
    assert batch.attention.context_lens.tolist() == [8, 3]
    assert batch.attention.block_tables[0].tolist() == [7, 3]
    assert [row.num_tokens for row in plan.logit_rows] == [6, 7, 8, 3]  # positions of the tokens to be chosen

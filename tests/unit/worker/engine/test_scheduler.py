from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation import SamplingParams
from tests.builders_engine import make_pool, make_sequence, make_settings
from worker.engine.blocks import BlockPool
from worker.engine.cost import UNMEASURED, StepBudget
from worker.engine.scheduler import Plan, Scheduler
from worker.engine.sequence import Sequence


def make_scheduler(num_blocks: int = 100, **limits: int) -> tuple[Scheduler, BlockPool]:
    pool = make_pool(num_blocks)
    settings = make_settings(**limits)
    return Scheduler(settings, pool, StepBudget(settings, UNMEASURED)), pool


def summary(plan: Plan) -> dict[str, int]:
    return {chunk.sequence.request_id: chunk.num_tokens for chunk in plan.chunks}


def run_step(scheduler: Scheduler) -> Plan:
    """Plan, "compute", and append a token to each sequence that is due one."""
    plan = scheduler.plan()
    scheduler.finish_step(plan)
    for sequence in plan.sampled:
        sequence.append(7)
    return plan


def test_a_long_prompt_gets_only_the_budget_that_decodes_leave() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    scheduler.add(make_sequence(8, "a"))
    run_step(scheduler)
    scheduler.add(make_sequence(100, "b", arrival=1))
    assert summary(run_step(scheduler)) == {"a": 1, "b": 15}
    assert summary(run_step(scheduler)) == {"a": 1, "b": 15}


def test_a_prompt_is_computed_in_chunks_and_sampled_after_the_last() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    sequence = make_sequence(40, "a")
    scheduler.add(sequence)
    plans = [run_step(scheduler) for _ in range(3)]
    assert [(p.num_tokens, p.sampled) for p in plans] == [(16, ()), (16, ()), (8, (sequence,))]


def test_prompts_share_a_step_in_order_of_priority_then_arrival() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    for name, priority, arrival in [("late", 0, 3), ("low", 1, 0), ("early", 0, 2)]:
        scheduler.add(make_sequence(6, name, priority=priority, arrival=arrival))
    assert summary(scheduler.plan()) == {"early": 6, "late": 6, "low": 4}


def test_no_more_sequences_run_than_there_are_places() -> None:
    scheduler, _ = make_scheduler(token_budget=16, max_num_seqs=2)
    for i in range(3):
        scheduler.add(make_sequence(2, f"s{i}", arrival=i))
    assert summary(scheduler.plan()) == {"s0": 2, "s1": 2}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_once_one_does_not_fit_none_behind_it_is_tried() -> None:
    scheduler, _ = make_scheduler(num_blocks=6, token_budget=64)
    for i, num_tokens in enumerate([8, 24, 2]):
        scheduler.add(make_sequence(num_tokens, f"s{i}", arrival=i))
    assert summary(scheduler.plan()) == {"s0": 8}


def test_a_newcomer_leaves_each_running_sequence_a_block_to_grow_into() -> None:
    scheduler, _ = make_scheduler(num_blocks=5, token_budget=64)
    scheduler.add(make_sequence(8, "a"))
    scheduler.add(make_sequence(12, "b", arrival=1))  # three blocks, and three are free
    assert summary(scheduler.plan()) == {"a": 8}


def test_the_newest_of_the_lowest_priority_gives_way() -> None:
    scheduler, pool = make_scheduler(num_blocks=12, token_budget=64)
    sequences = {
        name: make_sequence(8, name, priority=priority, arrival=arrival)
        for name, priority, arrival in [("old", 0, 0), ("low", 1, 1), ("lowest", 1, 2), ("new", 0, 3)]
    }
    for sequence in sequences.values():
        scheduler.add(sequence)
    plan = run_step(scheduler)
    assert len(plan.chunks) == 4
    pool.allocate(pool.num_free_blocks - 1)  # one block is left, and four sequences need one each
    plan = run_step(scheduler)
    assert summary(plan) == {"old": 1, "new": 1, "low": 1}
    assert (sequences["lowest"].num_computed_tokens, len(sequences["lowest"].block_ids)) == (0, 0)
    assert scheduler.num_preemptions == 1


def test_a_preempted_sequence_computes_its_prompt_and_output_again() -> None:
    scheduler, pool = make_scheduler(num_blocks=5, token_budget=64)
    first, second = make_sequence(7, "a"), make_sequence(5, "b", arrival=1)
    scheduler.add(first)
    scheduler.add(second)
    while not scheduler.num_preemptions:
        run_step(scheduler)
    assert second.num_output_tokens == 4  # 5 + 4 tokens need a third block
    scheduler.remove(first)
    plan = scheduler.plan()
    # Its two full blocks were still cached.
    assert summary(plan) == {"b": 1}
    assert plan.chunks[0].is_last
    pool.check_integrity()


def test_a_sequence_waits_for_the_blocks_that_another_is_computing() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    for i in range(2):
        scheduler.add(make_sequence(20, "p", prompt=list(range(20)), output_index=i))
    plans = [run_step(scheduler) for _ in range(3)]
    assert [[(c.sequence.output_index, c.num_tokens) for c in p.chunks] for p in plans] == [
        [(0, 16)],
        [(0, 4), (1, 4)],
        [(0, 1), (1, 1)],
    ]


def test_one_that_waits_for_blocks_in_flight_does_not_hold_up_others() -> None:
    scheduler, _ = make_scheduler(token_budget=32)
    scheduler.add(make_sequence(20, "a", prompt=list(range(20))))
    scheduler.add(make_sequence(20, "b", prompt=list(range(20)), arrival=1))
    scheduler.add(make_sequence(5, "c", arrival=2))
    assert summary(run_step(scheduler)) == {"a": 20, "c": 5}
    assert summary(run_step(scheduler)) == {"a": 1, "c": 1, "b": 4}


def test_a_failed_step_is_planned_again_and_shares_nothing() -> None:
    scheduler, pool = make_scheduler()
    scheduler.add(make_sequence(12, "a", prompt=list(range(12))))
    first = scheduler.plan()
    scheduler.fail_step(first)
    scheduler.add(make_sequence(12, "b", prompt=list(range(12)), arrival=1))
    assert summary(scheduler.plan()) == summary(first) == {"a": 12}
    pool.check_integrity()


def test_removing_frees_blocks_in_every_state() -> None:
    scheduler, pool = make_scheduler(token_budget=16)
    running, prefilling, waiting = make_sequence(8, "a"), make_sequence(90, "b"), make_sequence(390, "c", arrival=2)
    for sequence in (running, prefilling, waiting):
        scheduler.add(sequence)
    run_step(scheduler)
    for sequence in (prefilling, waiting, running):
        scheduler.remove(sequence)
        pool.check_integrity()
    assert pool.num_free_blocks == pool.num_usable_blocks
    assert list(scheduler.sequences()) == []


def test_expired_sequences_are_found_in_every_state() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    scheduler.add(make_sequence(40, "a", deadline=5.0))
    scheduler.add(make_sequence(4, "b", arrival=1, deadline=6.0))
    scheduler.add(make_sequence(4, "c", arrival=2))
    scheduler.plan()
    assert [s.request_id for s in scheduler.expired(4.9)] == []
    assert [s.request_id for s in scheduler.expired(6.0)] == ["a", "b"]


_sequences = st.builds(
    lambda prompt, num_outputs, priority: (prompt, num_outputs, priority),
    prompt=st.tuples(st.integers(0, 2), st.integers(1, 30)),
    num_outputs=st.integers(1, 20),
    priority=st.integers(0, 2),
)


@settings(max_examples=100, deadline=None)
@given(
    workload=st.lists(st.tuples(st.integers(0, 30), _sequences), min_size=1, max_size=12),
    num_blocks=st.integers(13, 40),
    token_budget=st.integers(4, 40),
    max_num_seqs=st.integers(1, 4),
    leavers=st.sets(st.integers(0, 11)),
)
def test_every_workload_runs_to_its_end_within_all_limits(
    workload: list[tuple[int, tuple[tuple[int, int], int, int]]],
    num_blocks: int,
    token_budget: int,
    max_num_seqs: int,
    leavers: set[int],
) -> None:
    scheduler, pool = make_scheduler(num_blocks, token_budget=token_budget, max_num_seqs=max_num_seqs)
    targets: dict[Sequence, int] = {}
    arrivals = sorted(enumerate(workload), key=lambda item: item[1][0])
    num_tokens_left = sum((start_len[1] + n) for _, (_, (start_len, n, _)) in arrivals)
    for step in range(40 + 40 * num_tokens_left):
        while arrivals and arrivals[0][1][0] <= step:
            i, (_, ((start, length), num_outputs, priority)) = arrivals.pop(0)
            prompt = [(k * 3) % 11 for k in range(start, start + length)]
            sequence = Sequence(f"s{i}", prompt, SamplingParams(max_tokens=1), priority=priority, arrival=i)
            targets[sequence] = min(num_outputs, num_blocks * 4 - length)
            scheduler.add(sequence)
        if not targets and not arrivals:
            break
        plan = scheduler.plan()
        assert plan.chunks or not targets, "sequences wait, but none runs"
        assert plan.num_tokens <= token_budget
        assert scheduler.num_running <= max_num_seqs
        assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            end = chunk.sequence.num_computed_tokens + chunk.num_tokens
            assert 0 < chunk.num_tokens <= chunk.sequence.num_uncomputed_tokens
            assert len(chunk.sequence.block_ids) * 4 >= end
        pool.check_integrity()
        scheduler.finish_step(plan)
        for sequence in plan.sampled:
            sequence.append(step % 11)
            if sequence.num_output_tokens == targets[sequence]:
                scheduler.remove(sequence)
                del targets[sequence]
        for sequence in [s for s in targets if s.arrival in leavers and step % 5 == 4]:
            scheduler.remove(sequence)
            del targets[sequence]
    assert not targets
    assert pool.num_free_blocks == pool.num_usable_blocks

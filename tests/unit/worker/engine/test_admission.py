from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation import SamplingParams
from tests.builders_engine import make_pool, make_sequence, make_settings
from worker.engine.admission import admission_order
from worker.engine.cost import UNMEASURED, StepBudget
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence


def order(cached: list[int], max_overtakings: int, *, overtaken: dict[int, int] | None = None) -> list[int]:
    """Indices of sequences, the oldest first, with so many cached blocks each."""
    sequences = [make_sequence(4, f"s{i}", arrival=i) for i in range(len(cached))]
    for i, count in (overtaken or {}).items():
        sequences[i].num_overtaken = count
    result = admission_order(sequences, dict(zip(sequences, cached, strict=True)), max_overtakings)
    return [sequences.index(sequence) for sequence in result]


def test_without_cached_prefixes_the_oldest_comes_first() -> None:
    assert order([0, 0, 0], 8) == [0, 1, 2]


def test_the_longest_cached_prefix_comes_first() -> None:
    assert order([0, 3, 5, 3], 8) == [2, 1, 3, 0]


def test_nobody_is_overtaken_more_often_than_the_bound() -> None:
    assert order([0, 1, 2, 3, 4], 2) == [4, 3, 0, 1, 2]
    assert order([0, 1, 2], 8, overtaken={0: 8}) == [0, 2, 1]
    assert order([0, 1, 2], 8, overtaken={1: 8}) == [1, 2, 0]
    assert order([0, 1, 2], 0) == [0, 1, 2]


def test_a_cached_prefix_does_not_cross_priorities() -> None:
    urgent, cached = make_sequence(4, "a", priority=0, arrival=1), make_sequence(4, "b", priority=1, arrival=0)
    assert admission_order([urgent, cached], {cached: 9}, 8) == [urgent, cached]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=12), st.integers(0, 4))
def test_an_order_admits_everybody_once_within_the_bound(waiting: list[tuple[int, int]], bound: int) -> None:
    cached = [blocks for blocks, _ in waiting]
    before = {i: min(count, bound) for i, (_, count) in enumerate(waiting)}
    found = order(cached, bound, overtaken=before)
    assert sorted(found) == list(range(len(waiting)))
    for place, i in enumerate(found):
        assert before[i] + sum(1 for other in found[:place] if other > i) <= bound


def make_scheduler(num_blocks: int = 100, **limits: int) -> Scheduler:
    limit = make_settings(**limits)
    return Scheduler(limit, make_pool(num_blocks), StepBudget(limit, UNMEASURED))


def run(scheduler: Scheduler, sequence: Sequence) -> None:
    scheduler.add(sequence)
    while sequence.num_output_tokens == 0:
        step(scheduler)
    scheduler.remove(sequence)


def step(scheduler: Scheduler) -> list[Sequence]:
    """Run one step; return who was admitted."""
    waiting = [s for s in scheduler.sequences() if not s.block_ids]
    plan = scheduler.plan()
    scheduler.finish_step(plan)
    for sequence in plan.sampled:
        sequence.append(7)
    return [s for s in waiting if s.block_ids]


def test_a_sequence_with_a_cached_prefix_is_admitted_before_an_older_one() -> None:
    scheduler = make_scheduler(token_budget=16)
    shared = list(range(100, 113))
    run(scheduler, make_sequence(prompt=shared))
    old, cached = make_sequence(20, "old", arrival=1), make_sequence(prompt=[*shared, 1, 2], arrival=2)
    scheduler.add(old)
    scheduler.add(cached)
    assert [(c.sequence, c.num_tokens) for c in scheduler.plan().chunks] == [(cached, 3), (old, 13)]
    assert (old.num_overtaken, cached.num_overtaken) == (1, 0)


def test_one_that_does_not_fit_keeps_its_place_before_younger_ones_only() -> None:
    scheduler = make_scheduler(num_blocks=8, token_budget=64)
    shared = list(range(100, 109))
    run(scheduler, make_sequence(prompt=shared))
    old = make_sequence(8, "old", arrival=1)
    large = make_sequence(prompt=[*shared, *range(20)], arrival=2)  # eight blocks: not beside another
    young = make_sequence(4, "young", arrival=3)
    for sequence in (old, large, young):
        scheduler.add(sequence)
    busy = make_sequence(4, "busy", priority=-1)
    scheduler.add(busy)
    assert step(scheduler) == [busy, old]
    assert (large.num_overtaken, young.num_overtaken) == (0, 0)


def text_of(sequence: Sequence) -> int:
    return sequence.token_ids[0] // 100


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 25),  # step
            st.integers(0, 3),  # which of the common texts it begins with
            st.integers(1, 30),  # tokens
            st.integers(1, 6),  # outputs
            st.integers(0, 1),  # priority
        ),
        min_size=2,
        max_size=25,
    ),
    bound=st.integers(0, 3),
    num_blocks=st.integers(10, 40),
    token_budget=st.integers(4, 32),
    max_num_seqs=st.integers(1, 4),
)
def test_whatever_arrives_nobody_waits_for_more_younger_ones_than_the_bound(
    arrivals: list[tuple[int, int, int, int, int]], bound: int, num_blocks: int, token_budget: int, max_num_seqs: int
) -> None:
    scheduler = make_scheduler(num_blocks, token_budget=token_budget, max_num_seqs=max_num_seqs, max_overtakings=bound)
    left = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    targets: dict[Sequence, int] = {}
    overtakings: dict[Sequence, int] = {}
    for number in range(3000):
        while left and left[0][1][0] <= number:
            i, (_, text, num_tokens, num_outputs, priority) = left.pop(0)
            prompt = [text * 100 + k for k in range(num_tokens)] + [1000 + i]
            sequence = Sequence(
                f"s{i}", prompt, SamplingParams(max_tokens=9), priority=priority, arrival=number * 100 + i
            )
            targets[sequence], overtakings[sequence] = num_outputs, 0
            scheduler.add(sequence)
        if not targets and not left:
            break
        admitted = step(scheduler)
        # One that waits for a block of this very step is passed for its own good, and that does not count.
        texts = {text_of(s) for s in targets if s.block_ids}
        for sequence in targets:
            if not sequence.block_ids and text_of(sequence) not in texts:
                younger = [s for s in admitted if s.priority == sequence.priority and s.order > sequence.order]
                overtakings[sequence] += len(younger)
        for sequence in [s for s in targets if s.num_output_tokens >= targets[s]]:
            scheduler.remove(sequence)
            del targets[sequence]
        assert all(count <= bound for count in overtakings.values())
    assert not targets

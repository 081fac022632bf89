from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders_engine import make_pool, make_sequence, make_settings
from worker.engine import scheduler as scheduling
from worker.engine.cost import UNMEASURED, StepBudget
from worker.engine.fairness import TenantService, fair_order
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence

NUM_PLACES = 4
MAX_PROMPT, MAX_OUTPUT = 24, 12


class Load:
    """A scheduler whose sequences end after as many tokens as they were given."""

    def __init__(self, rng: random.Random, max_overtakings: int = 0) -> None:
        limits = make_settings(max_num_seqs=NUM_PLACES, token_budget=32, max_overtakings=max_overtakings)
        self.scheduler = Scheduler(limits, make_pool(60), StepBudget(limits, UNMEASURED))
        self.rng = rng
        self.targets: dict[Sequence, int] = {}
        self.served: dict[str, float] = {}  # tokens over weight
        self.num_added = 0

    def add(self, tenant: str, weight: float = 1.0, *, max_output: int = MAX_OUTPUT) -> Sequence:
        self.num_added += 1
        sequence = make_sequence(
            self.rng.randint(1, MAX_PROMPT),
            f"s{self.num_added}",
            arrival=self.num_added,
            tenant=tenant,
            weight=weight,
        )
        self.targets[sequence] = self.rng.randint(1, max_output)
        self.scheduler.add(sequence)
        return sequence

    def num_waiting(self, tenant: str) -> int:
        return sum(not s.block_ids and s.tenant == tenant for s in self.targets)

    def step(self) -> list[Sequence]:
        """Run one step; return who was admitted."""
        waiting = [s for s in self.targets if s.num_hit_tokens is None]
        plan = self.scheduler.plan()
        self.scheduler.finish_step(plan)
        admitted = [s for s in waiting if s.num_hit_tokens is not None]
        for s in admitted:
            self.served[s.tenant] = self.served.get(s.tenant, 0.0) + s.num_prompt_tokens / s.weight
        for s in plan.sampled:
            s.append(7)
            self.served[s.tenant] += 2 / s.weight
        for s in [s for s in self.targets if s.num_output_tokens >= self.targets[s]]:
            self.scheduler.remove(s)
            del self.targets[s]
        return admitted


def largest_difference(seed: int) -> float:
    """Of what two tenants get that always wait, over their weights, which is what VTC bounds; others come and go."""
    rng = random.Random(seed)
    load = Load(rng)
    weights = {"a": 1.0, "b": rng.choice([1.0, 3.0])}
    worst = 0.0
    for number in range(400):
        for tenant, weight in weights.items():
            while load.num_waiting(tenant) < 5:
                load.add(tenant, weight, max_output=MAX_OUTPUT if tenant == "a" else 2)
        if number % 5 == 0:
            load.add(f"other-{rng.randint(0, 3)}")
        load.step()
        served = [load.served.get(tenant, 0.0) for tenant in weights]
        worst = max(worst, abs(served[0] - served[1]))
    return worst


# One prompt, and what sequences in all places generate from beginning to end.
BOUND = MAX_PROMPT + NUM_PLACES * (MAX_PROMPT + 2 * MAX_OUTPUT)


@pytest.mark.parametrize("seed", range(5))
def test_the_service_of_two_tenants_that_always_wait_differs_by_a_batch_at_most(seed: int) -> None:
    assert largest_difference(seed) <= BOUND


def by_arrival(waiting: Iterable[Sequence], counters: object) -> list[Sequence]:
    return list(waiting)


def by_name(waiting: Iterable[Sequence], counters: object) -> list[Sequence]:
    return sorted(waiting, key=lambda s: (s.priority, s.tenant, s.order))


@pytest.mark.parametrize("mutant", [by_arrival, by_name])
def test_an_order_without_turns_is_noticed(
    mutant: Callable[[Iterable[Sequence], object], list[Sequence]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "fair_order", mutant)
    assert any(largest_difference(seed) > BOUND for seed in range(5))


def test_a_service_that_counts_no_output_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TenantService, "generate", lambda *_: None)
    assert any(largest_difference(seed) > BOUND for seed in range(5))


def turns_of_an_old_tenant(max_overtakings: int) -> int:
    """In 300 steps in which more newcomers come than there are places, behind the first ones."""
    load = Load(random.Random(1), max_overtakings)
    for _ in range(30):
        load.add("old")
    turns: Counter[str] = Counter()
    for number in range(300):
        load.add(f"new-{number}")
        admitted = load.step()
        turns.update(s.tenant for s in admitted if number > 10)
    return turns["old"]


@pytest.mark.parametrize("max_overtakings", [0, 3])
def test_newcomers_do_not_keep_a_tenant_from_its_turn(max_overtakings: int) -> None:
    assert turns_of_an_old_tenant(max_overtakings) >= 3


def test_newcomers_that_were_not_lifted_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(self: TenantService, sequence: Sequence, waiting: object) -> None:
        self._counters.setdefault(sequence.tenant, 0.0)
        self._num_live[sequence.tenant] += 1

    monkeypatch.setattr(TenantService, "enter", enter)
    assert turns_of_an_old_tenant(0) == 0


def test_newcomers_that_all_began_where_the_last_one_did_would(monkeypatch: pytest.MonkeyPatch) -> None:
    admit = TenantService.admit
    monkeypatch.setattr(
        TenantService, "admit", lambda self, sequence, number, waiting: admit(self, sequence, number, ())
    )
    assert turns_of_an_old_tenant(0) == 0


def test_one_that_was_idle_has_earned_nothing() -> None:
    load = Load(random.Random(3))
    for _ in range(60):
        load.add("busy")
        load.step()
    for _ in range(40):
        load.add("busy")
        load.add("idle")
    served_before = load.served["busy"]
    for _ in range(60):
        load.step()
    assert abs(load.served["idle"] - (load.served["busy"] - served_before)) <= BOUND


def test_priorities_come_before_turns_and_what_was_admitted_once_before_others() -> None:
    counters = {"a": 100.0, "b": 0.0}
    urgent = make_sequence(4, "urgent", tenant="a", priority=0, arrival=9)
    preempted = make_sequence(4, "preempted", tenant="a", priority=1, arrival=3)
    preempted.num_hit_tokens = 0
    old = make_sequence(4, "old", tenant="a", priority=1, arrival=1)
    young = make_sequence(4, "young", tenant="b", priority=1, arrival=4)
    waiting = [urgent, old, preempted, young]
    assert fair_order(waiting, counters) == [urgent, preempted, young, old]


def test_turns_of_one_step_are_shared_out() -> None:
    waiting = [make_sequence(10, f"a{i}", tenant="a", arrival=i) for i in range(4)]
    waiting += [make_sequence(10, f"b{i}", tenant="b", arrival=9 + i, weight=2.0) for i in range(4)]
    order = fair_order(waiting, {"a": 0.0, "b": 0.0})
    assert [s.request_id for s in order] == ["a0", "b0", "b1", "a1", "b2", "b3", "a2", "a3"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.booleans()), max_size=15))
def test_an_order_has_everybody_once_and_keeps_a_tenants_own(parts: list[tuple[str, int, bool]]) -> None:
    waiting = [make_sequence(3, f"s{i}", tenant=t, priority=p, arrival=i) for i, (t, p, _) in enumerate(parts)]
    for sequence, (_, _, was_admitted) in zip(waiting, parts, strict=True):
        sequence.num_hit_tokens = 0 if was_admitted else None
    waiting.sort(key=lambda s: s.order)
    order = fair_order(waiting, {"a": 1.0, "b": 0.0, "c": 5.0})
    assert sorted(order, key=lambda s: s.order) == waiting
    for tenant in "abc":
        own = [s for s in order if s.tenant == tenant and s.num_hit_tokens is None]
        assert own == sorted(own, key=lambda s: s.order)


def test_tenants_of_the_past_are_forgotten() -> None:
    load = Load(random.Random(5))
    for number in range(3000):
        load.add(f"t{number}")
        while load.targets:
            load.step()
    assert len(load.scheduler._service.counters) <= 1025

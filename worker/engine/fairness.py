"""Which tenant's waiting sequence is next, among those of one priority: the one that had the least service. Pure.

Virtual token counters (VTC, arXiv:2401.00588): a tenant's counter grows by the tokens that this engine computes for it,
prompt once and output twice, over its weight. One that begins to wait is lifted to where its priority has come to, so
that having been idle earns nothing: to the counter at which a sequence was admitted last (start-time fair queueing). Of
two tenants that always wait, the counters differ by no more than one prompt and what one batch generates: of a tenant
that is ahead nothing new is admitted, only what runs goes on.

Nobody starves: a counter stands still while its tenant only waits, those of others grow when they are admitted, and
once a newcomer was, later ones begin at the next counter in line, where the older sequence goes first. What has been
admitted once goes before all others of its priority, in static order: a preemption takes back blocks, not the turn.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as List
from itertools import groupby
from typing import Final

from worker.engine.sequence import Sequence

INPUT_COST: Final = 1
OUTPUT_COST: Final = 2
_MAX_IDLE_TENANTS: Final = 1024


class TenantService:
    """What each tenant has had, as far as it still means anything."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._num_live: Counter[str] = Counter()  # sequences, waiting and running
        self._reached: dict[int, float] = {}  # by priority: where newcomers begin

    @property
    def counters(self) -> Mapping[str, float]:
        """Token units over weight."""
        return self._counters

    def enter(self, sequence: Sequence, waiting: Iterable[Sequence]) -> None:
        """A sequence begins to wait; `waiting` are those who do already."""
        counter = self._counters.get(sequence.tenant, 0.0)
        others = self._others(sequence, waiting)
        if sequence.tenant not in others:
            level = self._reached.get(sequence.priority)
            if level is None:
                level = min(others.values(), default=max(self._reached.values(), default=0.0))
            counter = max(counter, level)
        self._counters[sequence.tenant] = counter
        self._num_live[sequence.tenant] += 1

    def _others(self, sequence: Sequence, waiting: Iterable[Sequence]) -> dict[str, float]:
        return {other.tenant: self._counters[other.tenant] for other in waiting if other.priority == sequence.priority}

    def join(self, sequence: Sequence) -> None:
        """A sequence begins beside others of its tenant, without having waited."""
        self._num_live[sequence.tenant] += 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence is over. Forget tenants that would be lifted above their counter in any case."""
        tenant = sequence.tenant
        self._num_live[tenant] -= 1
        if self._num_live[tenant]:
            return
        del self._num_live[tenant]
        if len(self._counters) - len(self._num_live) > _MAX_IDLE_TENANTS:
            idle = [name for name in self._counters if name not in self._num_live]
            for name in sorted(idle, key=self._counters.__getitem__)[: _MAX_IDLE_TENANTS // 2]:
                del self._counters[name]

    def admit(self, sequence: Sequence, num_tokens: int, waiting: Iterable[Sequence]) -> None:
        """A sequence was admitted, and so many tokens of it are to be computed; `waiting` are those who still wait."""
        counter = self._counters[sequence.tenant]
        reached = self._reached.get(sequence.priority, -math.inf)
        if counter <= reached:
            later = (other for other in self._others(sequence, waiting).values() if other > reached)
            counter = min(later, default=reached)
        self._reached[sequence.priority] = counter
        self._counters[sequence.tenant] += INPUT_COST * num_tokens / sequence.weight

    def generate(self, sequence: Sequence, num_tokens: int) -> None:
        """So many tokens were generated."""
        self._counters[sequence.tenant] += OUTPUT_COST * num_tokens / sequence.weight


def fair_order(waiting: List[Sequence], counters: Mapping[str, float]) -> list[Sequence]:
    """Return `waiting`, which is in static order, in the order of turns: by priority, then as said above.

    Each turn counts with the sequence's tokens, so that several admitted in one step are shared out as well.
    """
    first = waiting[0].tenant if waiting else ""
    if all(sequence.tenant == first for sequence in waiting):
        return list(waiting)
    order: list[Sequence] = []
    for _, group in groupby(waiting, key=lambda sequence: sequence.priority):
        queues: dict[str, deque[Sequence]] = {}
        for sequence in group:
            if sequence.num_hit_tokens is not None:
                order.append(sequence)
            else:
                queues.setdefault(sequence.tenant, deque()).append(sequence)
        turns = [(counters[tenant], queue[0].order, tenant) for tenant, queue in queues.items()]
        heapq.heapify(turns)
        while turns:
            counter, _, tenant = heapq.heappop(turns)
            queue = queues[tenant]
            sequence = queue.popleft()
            order.append(sequence)
            if queue:
                counter += INPUT_COST * sequence.num_tokens / sequence.weight
                heapq.heappush(turns, (counter, queue[0].order, tenant))
    return order

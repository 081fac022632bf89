"""Which texts are computed next: by priority, in it tenants by turns, a tenant's requests in order of arrival. Pure.

Virtual token counters as in `worker/engine/fairness.py` (VTC, arXiv:2401.00588), in their simplest form: there is
nothing but input, and a text is computed at once, so a turn is one text. A tenant that had nothing to do begins where
the one that is farthest behind stands: having been idle earns nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from worker.engine.types import GenerationRequest
from worker.tasks.runner import Text


@dataclass(slots=True, eq=False)
class Pending:
    """A request with texts that are not computed yet."""

    request: GenerationRequest
    texts: tuple[Text, ...]
    next_text: int = 0  # the first that no batch has taken


@dataclass(slots=True)
class _Class:
    """The requests of one priority."""

    queues: dict[str, deque[Pending]] = field(default_factory=dict)  # by tenant, none empty
    counters: dict[str, float] = field(default_factory=dict)  # tokens over weight, of those with a queue

    def add(self, pending: Pending) -> None:
        tenant = pending.request.tenant
        if tenant not in self.queues:
            self.queues[tenant] = deque()
            self.counters[tenant] = min(self.counters.values(), default=0.0)
        self.queues[tenant].append(pending)

    def remove(self, pending: Pending) -> None:
        tenant = pending.request.tenant
        queue = self.queues.get(tenant)
        if queue is None or pending not in queue:
            return
        queue.remove(pending)
        if not queue:
            del self.queues[tenant], self.counters[tenant]

    def first(self) -> Pending:
        """Return the request whose text is next: of the tenant that is farthest behind, the first that came."""
        return self.queues[min(self.queues, key=lambda tenant: self.counters[tenant])][0]

    def take(self, pending: Pending) -> int:
        """Take the next text of a request; return its index."""
        index = pending.next_text
        pending.next_text += 1
        self.counters[pending.request.tenant] += len(pending.texts[index]) / pending.request.weight
        if pending.next_text == len(pending.texts):
            self.remove(pending)
        return index


class TextQueue:
    """The texts that wait, of all requests."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}

    def __len__(self) -> int:
        """How many texts wait."""
        queues = (queue for one in self._classes.values() for queue in one.queues.values())
        return sum(len(pending.texts) - pending.next_text for queue in queues for pending in queue)

    def add(self, pending: Pending) -> None:
        self._classes.setdefault(pending.request.priority, _Class()).add(pending)

    def remove(self, pending: Pending) -> None:
        """Forget what waits of a request."""
        self._classes.get(pending.request.priority, _Class()).remove(pending)

    def take(self, max_tokens: int) -> list[tuple[Pending, int]]:
        """Return the next texts, each as its request and its index there: one at least, and as many as fit."""
        taken: list[tuple[Pending, int]] = []
        num_tokens = 0
        for priority in sorted(self._classes):
            one = self._classes[priority]
            while one.queues:
                pending = one.first()
                num_tokens += len(pending.texts[pending.next_text])
                if taken and num_tokens > max_tokens:
                    return taken
                taken.append((pending, one.take(pending)))
        return taken


def buckets(lengths: list[int], max_waste: float) -> list[list[int]]:
    """Group texts by length; return the indices of each group, so that padding adds at most `max_waste` to its tokens.

    From the longest on: a group takes the next shorter text as long as its padded rows stay below that.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    width = num_tokens = 0
    for index in order:
        length = lengths[index]
        if groups and width * (len(groups[-1]) + 1) <= (1 + max_waste) * (num_tokens + length):
            groups[-1].append(index)
            num_tokens += length
        else:
            groups.append([index])
            width = num_tokens = length
    return groups

"""Which running generations give way to waiting ones of the highest priority class. Pure.

Bounded: a generation gives way at most MAX_PREEMPTIONS times in its life, on whatever worker, and then stays until it
ends; one that its class's share of the service has brought here stays in any case. So every generation still ends, and
preemption never takes back what the queue guarantees to lower classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

MAX_PREEMPTIONS: Final = 4
HIGHEST_CLASS: Final = 0


@dataclass(frozen=True, slots=True)
class Runner:
    """A held generation, as far as it matters here."""

    generation_id: str
    priority: int
    age: int  # place in the order of claims, the oldest first
    kv_tokens: int  # about what its end would free
    num_preemptions: int
    by_share: bool  # it runs for its class's share of the service

    @property
    def may_give_way(self) -> bool:
        """Whether a waiting generation of the highest class may take its place."""
        return self.priority > HIGHEST_CLASS and self.num_preemptions < MAX_PREEMPTIONS and not self.by_share


def choose_victims(runners: Iterable[Runner], *, places: int, kv_tokens: int) -> list[str]:
    """Return just enough generations to free so many places and KV slots, both 0 or less where there is room.

    The lowest class gives way first, in it the youngest: it has the least to compute again. None where even all that
    may give way are not enough: they would have stopped for nothing.
    """
    victims: list[str] = []
    for runner in sorted(runners, key=lambda runner: (-runner.priority, -runner.age)):
        if places <= 0 and kv_tokens <= 0:
            break
        if runner.may_give_way:
            victims.append(runner.generation_id)
            places -= 1
            kv_tokens -= runner.kv_tokens
    return victims if places <= 0 and kv_tokens <= 0 else []

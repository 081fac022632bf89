"""Breadth-first search through all states of a transition system, and what follows from it.

Finds the shortest way to a state that breaks a property, and states from which no way leads to a goal any more.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True)
class Violation:
    """A broken property: what is wrong, and the actions that lead there from the initial state."""

    property: str
    detail: str
    trace: tuple[str, ...]

    def __str__(self) -> str:
        steps = "\n".join(f"  {number:2d}. {action}" for number, action in enumerate(self.trace, 1))
        return f"{self.property}: {self.detail}\n{steps}"


@dataclass(frozen=True)
class Explored:
    """What was found. `is_complete` False: the limit was reached, and nothing is known of the states beyond it."""

    num_states: int
    num_steps: int
    depth: int
    seconds: float
    is_complete: bool
    violation: Violation | None


LIVENESS = "liveness"


class Explorer(Generic[S]):
    """`broken` tells which law a state breaks, and how, or nothing."""

    def __init__(
        self,
        successors: Callable[[S], Iterable[tuple[str, S]]],
        broken: Callable[[S], tuple[str, str] | None],
        is_goal: Callable[[S], bool],
        *,
        max_states: int,
    ) -> None:
        self._successors = successors
        self._broken = broken
        self._is_goal = is_goal
        self._max_states = max_states

    def explore(self, initial: S) -> Explored:
        """Visit every reachable state, the nearest first; end at the first that breaks a law."""
        was_enabled = gc.isenabled()
        gc.disable()  # states are trees: looking for cycles among a million of them takes longer than all the rest
        try:
            return self._explore(initial)
        finally:
            if was_enabled:
                gc.enable()

    def _explore(self, initial: S) -> Explored:
        started = time.monotonic()
        index: dict[S, int] = {initial: 0}
        parents, actions = array("q", [-1]), [""]
        depths = array("i", [0])
        sources, targets = array("I"), array("I")
        goals = bytearray([self._is_goal(initial)])
        is_complete = True
        names: dict[str, str] = {}

        def result(violation: Violation | None) -> Explored:
            seconds = time.monotonic() - started
            return Explored(len(index), len(sources), depths[-1], seconds, is_complete, violation)

        def trace(at: int) -> tuple[str, ...]:
            steps = []
            while parents[at] >= 0:
                steps.append(actions[at])
                at = parents[at]
            return tuple(reversed(steps))

        broken = self._broken(initial)
        if broken is not None:
            return result(Violation(*broken, trace(0)))
        level, level_at = [initial], 0
        while level:
            following: list[S] = []  # states are kept as keys of `index` alone, and here until they are expanded
            for offset, state in enumerate(level):
                source = level_at + offset
                for action, after in self._successors(state):
                    target = index.get(after)
                    if target is None:
                        if len(index) >= self._max_states:
                            is_complete = False
                            continue
                        target = len(index)
                        index[after] = target
                        parents.append(source)
                        actions.append(names.setdefault(action, action))
                        depths.append(depths[source] + 1)
                        broken = self._broken(after)
                        if broken is not None:
                            return result(Violation(*broken, trace(target)))
                        goals.append(self._is_goal(after))
                        following.append(after)
                    sources.append(source)
                    targets.append(target)
            level_at += len(level)
            level = following
        if is_complete:
            stuck = _first_stuck(sources, targets, goals)
            if stuck is not None:
                detail = "from here no way leads to the goal"
                return result(Violation(LIVENESS, detail, trace(stuck)))
        return result(None)


def _first_stuck(sources: array[int], targets: array[int], goals: bytearray) -> int | None:
    """The first state from which no goal can be reached.

    Most steps lead to states that were found later, so few passes from the last step to the first suffice.
    """
    reaches = bytearray(goals)
    changed = True
    while changed:
        changed = False
        for source, target in zip(reversed(sources), reversed(targets), strict=True):
            if reaches[target] and not reaches[source]:
                reaches[source] = 1
                changed = True
    stuck = reaches.find(0)
    return None if stuck < 0 else stuck

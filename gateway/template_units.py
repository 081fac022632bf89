"""The units that renderings of chat templates are charged in, and what is left of them. Pure.

One unit stands for a byte, or for some nanoseconds of work: at most some forty, whatever a template does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NoReturn, cast

import jinja2
import jinja2.utils

_BASE_UNITS: Final = 1_500_000  # some tens of milliseconds, whatever the template does with them
_UNITS_PER_CHAR: Final = 32
_UNITS_PER_MESSAGE: Final = 20_000
_VISITS_PER_MESSAGE: Final = 4  # how often a template may run over its own text for a message
_MAX_NODES: Final = 5_000  # templates of use have a few hundred to two thousand

STEP: Final = 100  # an iteration or a call
ITEM: Final = 16  # an element of a list
NODE: Final = 10  # an expression or statement in a loop's body, of which not all are charged when they run
MAX_BITS: Final = 4096  # of a whole number: to divide large ones takes the square of their size
_FLOAT: Final = 48  # its shortest decimal text is looked for
# Unions are built anew each time that they are written out.
_TEXTS: Final = (str, bytes)
_VIEWS: Final[tuple[type, ...]] = (type({}.items()), type({}.keys()), type({}.values()))
_CONTAINERS: Final[tuple[type, ...]] = (list, tuple, set, frozenset, *_VIEWS)


class TemplateTooCostlyError(jinja2.TemplateError):
    """A rendering has used its budget up, or has asked for something without a bound."""


class Budget:
    """What is left of one rendering's units."""

    def __init__(self, units: int) -> None:
        self.left = units
        self._units = units

    @property
    def spent(self) -> int:
        return self._units - self.left

    def charge(self, units: int) -> None:
        """Raises TemplateTooCostlyError once nothing is left."""
        self.left -= units
        if self.left < 0:
            raise TemplateTooCostlyError("the chat template takes too long, or makes too much, of this conversation")

    def weigh(self, value: object) -> int:
        """Return the units of a value with all that it holds, as often as it is held; at most what is left, else raise.

        A list that holds another twice weighs it twice, as its text would.
        """
        weight = 0
        waiting: list[Any] = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, _TEXTS):
                weight += 1 + len(item)
            elif isinstance(item, int):
                if item.bit_length() > MAX_BITS:
                    refuse("a whole number of the chat template has too many digits")
                weight += 1 + (item.bit_length() >> 3)
            elif isinstance(item, float):
                weight += _FLOAT
            elif isinstance(item, dict):
                weight += 1 + 2 * ITEM * len(item)
                self._check(weight)
                waiting += item.keys()
                waiting += item.values()
            elif isinstance(item, _CONTAINERS):
                held = cast("Collection[Any]", item)
                weight += 1 + ITEM * len(held)
                self._check(weight)
                waiting += held
            elif isinstance(item, jinja2.utils.Namespace):
                weight += 1 + ITEM
                waiting += object.__getattribute__(item, "_Namespace__attrs").values()
            else:
                weight += 1
            self._check(weight)
        return weight

    def _check(self, weight: int) -> None:
        if weight > self.left:
            self.charge(weight)


def budget_of(num_chars: int, num_messages: int, num_nodes: int) -> Budget:
    """Return the budget of a conversation for a template of so many nodes: a few visits of each by each."""
    per_message = _UNITS_PER_MESSAGE + _VISITS_PER_MESSAGE * NODE * min(num_nodes, _MAX_NODES)
    return Budget(_BASE_UNITS + _UNITS_PER_CHAR * num_chars + per_message * num_messages)


BUDGET: ContextVar[Budget] = ContextVar("torchrelay_template_budget")


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Everything that templates do inside is charged to `budget`."""
    token = BUDGET.set(budget)
    try:
        yield
    finally:
        BUDGET.reset(token)


def shallow(value: object) -> int:
    """Return the units of looking at each element of a value once, not into them."""
    return ITEM * len(value) if isinstance(value, str | list | tuple | dict | range) else ITEM


def refuse(message: str) -> NoReturn:
    raise TemplateTooCostlyError(message)

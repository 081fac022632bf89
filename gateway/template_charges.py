"""What the filters, tests, methods and operators of chat templates cost: charged before they do their work.

Only what is known to take time and room linear in its operands is let through; what grows faster has its result
estimated first, and what cannot be estimated is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import wraps
from typing import Any, Final

import jinja2.runtime
import jinja2.utils
from markupsafe import Markup

from gateway.template_units import BUDGET, ITEM, MAX_BITS, STEP, Budget, refuse, shallow

_MAX_WIDTH: Final = 4096
_MAX_PRECISION: Final = 32
# They hand on references, or look at one end.
_FILTERS_OF_ONE_STEP: Final = frozenset({"length", "count", "first", "last", "default", "d", "attr"})
_SHALLOW_FILTERS: Final = frozenset(
    {"list", "reverse", "items", "map", "select", "reject", "selectattr", "rejectattr", "batch", "slice"}
)
# They call a test, a filter or a look-up for each item, when their result is read.
_CALLING_FILTERS: Final = frozenset({"map", "select", "reject", "selectattr", "rejectattr"})
_FILTERS_BY_ATTRIBUTE: Final = frozenset(
    {"map", "selectattr", "rejectattr", "sort", "groupby", "unique", "min", "max", "sum", "join"}
)
_SORTING_FILTERS: Final = frozenset({"sort", "groupby", "dictsort"})
_COMPARING_FILTERS: Final = frozenset({"min", "max", "unique"}) | _SORTING_FILTERS
_FILTERS_BY_WORD: Final = frozenset({"title", "wordcount", "urlencode"})  # Python's own steps for every few characters
_REMOVED_MARKUP_METHODS: Final = frozenset({"striptags", "unescape"})
_CHARGED_TESTS: Final = frozenset(
    {"eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">=", "in"}
    | {"lower", "upper"}  # of a value's text
)
_REMOVED_METHODS: Final = frozenset({"translate", "maketrans", "expandtabs", "format_map", "encode"})
# In the worst case they look at each character of the text for each of their argument.
_QUADRATIC_METHODS: Final = frozenset({"strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"})
_PADDING_METHODS: Final = frozenset({"center", "ljust", "rjust", "zfill"})
_SHALLOW_METHODS: Final = frozenset({"get", "items", "keys", "values", "copy"})
_LONG_NUMBER: Final = re.compile(r"\d{4,}|\*")
_NESTED_FIELD: Final = re.compile(r"\{[^{}]*\{")


def before_sequences(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge for an operator with a text or list on a side, by the size of what it will make."""
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(times, int):
                budget.charge(budget.weigh(sequence) * max(0, times))
    elif operator == "%" and isinstance(left, str):
        _check_format(budget, left, (right,))
    else:
        budget.charge(budget.weigh((left, right)))


def check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * max(0, exponent) > MAX_BITS:
        refuse("a power in the chat template has too many digits")


def _check_format(budget: Budget, template: str, values: object) -> None:
    """A field takes its value's text and up to three digits of padding; wider ones and computed widths are refused."""
    if _LONG_NUMBER.search(template) or _NESTED_FIELD.search(template):
        refuse("a format in the chat template has a width without a bound")
    num_fields = template.count("%") + template.count("{")
    budget.charge(len(template) + num_fields * (1000 + budget.weigh(values)))


def before_method(budget: Budget, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Charge for a method of a value; return whether its arguments and result need no weighing."""
    owner, name = method.__self__, method.__name__
    if isinstance(owner, jinja2.runtime.LoopContext | jinja2.utils.Cycler):
        return False
    if isinstance(owner, dict):
        if name in _SHALLOW_METHODS:
            budget.charge(ITEM if name == "get" else shallow(owner))
            return True
    elif isinstance(owner, str):
        if isinstance(owner, Markup):  # written in Python, with a new text for each part
            if name in _REMOVED_MARKUP_METHODS:
                refuse(f"the method {name} of marked texts is not there for chat templates")
            budget.charge(2 * ITEM * len(owner))
        if name in _REMOVED_METHODS:
            refuse(f"the method {name} of texts is not there for chat templates")
        budget.charge(len(owner))
        _before_text_method(budget, owner, name, args, kwargs)
        return False
    elif not isinstance(owner, list | tuple):
        refuse(f"the method {name} is not there for chat templates")
    budget.charge(budget.weigh(owner))
    return False


def before_function(budget: Budget, function: Any, args: tuple[Any, ...]) -> None:
    """Charge for a map that is made of pairs, whose keys can be chosen to take the square of their number."""
    if function is not dict and function is not jinja2.utils.Namespace:
        return
    budget.charge(2 * STEP)
    for pairs in args:
        if isinstance(pairs, list | tuple):
            budget.charge(len(pairs) ** 2)
        elif not isinstance(pairs, dict):
            refuse("a map is made of a list of pairs in chat templates")


def _before_text_method(budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if name in _PADDING_METHODS:
        _check_widths(args)
    elif name == "format":
        _check_format(budget, text, (args, kwargs))
    elif name == "replace":
        _check_replacement(budget, text, args, kwargs)
    elif name in _QUADRATIC_METHODS:
        _charge_quadratic(budget, text, (*args, *kwargs.values()))
    elif name == "join" and args:
        _check_join(budget, text, args[0])


def _charge_quadratic(budget: Budget, text: str, values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, str):
            budget.charge(len(text) * len(value) // 16)


def _check_widths(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and value > _MAX_WIDTH for value in values):
        refuse(f"a width in the chat template is over {_MAX_WIDTH}")


def _check_replacement(budget: Budget, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    old, new = (*args, kwargs.get("old", ""), kwargs.get("new", ""))[:2] if len(args) < 2 else args[:2]
    times = len(text) // max(1, len(str(old))) + 1
    budget.charge(times * len(str(new)))


def _check_join(budget: Budget, separator: str, items: Any) -> None:
    if isinstance(items, str | list | tuple | dict | range):
        budget.charge(len(items) * (len(separator) + ITEM))
    else:
        refuse("join takes a list in chat templates")


def charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter with its cost charged; it stays what jinja passes context or environment to."""
    num_passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        budget.charge(STEP)
        passed, operands = args[:num_passed], list(args[num_passed:])
        if name in _FILTERS_OF_ONE_STEP:
            return function(*args, **kwargs)
        if operands and isinstance(operands[0], Iterator):  # its size is not known before
            operands[0] = list(_each_charged(budget, operands[0]))
        if name in _FILTERS_BY_ATTRIBUTE:  # whose name is taken apart
            texts = [item for item in (*operands[1:], *kwargs.values()) if isinstance(item, str)]
            budget.charge(ITEM * sum(map(len, texts)))
        if name in _CALLING_FILTERS and operands:
            budget.charge(STEP * (shallow(operands[0]) // ITEM))
        if name in _SHALLOW_FILTERS:
            _check_widths((*operands[1:], *kwargs.values()))
            budget.charge(sum(shallow(operand) for operand in (*operands, *kwargs.values())))
            return function(*passed, *operands, **kwargs)
        weight = budget.weigh((operands, kwargs))
        budget.charge(weight)
        if name in _COMPARING_FILTERS:
            budget.charge(weight * _comparisons(name, operands, kwargs))
        _before_filter(budget, name, operands, kwargs)
        result = function(*passed, *operands, **kwargs)
        budget.charge(budget.weigh(result))
        return result

    return charged


def _comparisons(name: str, operands: list[Any], kwargs: Mapping[str, Any]) -> int:
    """Return how often, about, each item is compared, with all that it holds.

    That is the logarithm of their number for what sorts, and the number itself for what hashes, since hashes of numbers
    can be chosen; by each of the attributes that are named.
    """
    num_items = len(operands[0]) if operands and isinstance(operands[0], Sized) else 1
    names = [item for item in (*operands[1:], *kwargs.values()) if isinstance(item, str)]
    num_names = 1 + sum(item.count(",") for item in names)
    if name == "unique":
        return num_items // ITEM + num_names
    return num_names * (num_items.bit_length() // 2 if name in _SORTING_FILTERS else 1)


def _each_charged(budget: Budget, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        budget.charge(STEP)
        yield item


def _before_filter(budget: Budget, name: str, operands: list[Any], kwargs: Mapping[str, Any]) -> None:
    if not operands:
        return
    if name in _FILTERS_BY_WORD:
        budget.charge(ITEM * budget.weigh(operands[0]))
    value, rest = operands[0], (*operands[1:], *kwargs.values())
    if name in ("indent", "tojson"):
        _check_widths(rest)
        # Every line, or every element, may get the whole indentation, which may be a text.
        widths = [len(item) if isinstance(item, str) else item for item in rest if isinstance(item, str | int)]
        budget.charge(budget.weigh(value) * (1 + sum(widths)))
    elif name == "replace":
        _check_replacement(budget, str(value), tuple(map(str, operands[1:3])), {k: str(v) for k, v in kwargs.items()})
    elif name == "join":
        separator = next((item for item in rest if isinstance(item, str)), "")
        budget.charge(shallow(value) * (1 + sum(len(item) for item in rest if isinstance(item, str)) + len(separator)))
    elif name == "format":
        _check_format(budget, str(value), (operands[1:], kwargs))
    elif name == "trim":
        _charge_quadratic(budget, str(value), rest)
    elif name == "round" and any(isinstance(item, int) and abs(item) > _MAX_PRECISION for item in rest):
        refuse(f"a precision in the chat template is over {_MAX_PRECISION}")
    elif name == "sum" and any(isinstance(item, str | list | tuple) for item in rest):
        refuse("sum takes numbers in chat templates")  # of lists it copies all that it has, again and again


def charged_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the test with its cost charged, if it looks at more than a value's kind."""
    if name not in _CHARGED_TESTS:
        return function

    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        budget.charge(STEP + budget.weigh((args, kwargs)))
        return function(*args, **kwargs)

    return charged

"""A sandbox for chat templates that bounds what one rendering costs, in time and in memory.

A template comes with a model and is a program: it can loop, call itself, double a text forty times, or ask for a number
with a billion digits. Nothing outside can stop a thread that does so, so the sandbox counts. Each iteration, call,
filter and operator is charged for what it is about to do and to make, before it does it, and a rendering that has used
its budget up ends with an error. Only what is known to take time and room linear in its operands is let through; what
grows faster has its result estimated first, and what cannot be estimated is not there.

One unit is about a nanosecond of work, or a byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any, Final, NoReturn, cast

import jinja2
import jinja2.nodes as n
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2.visitor import NodeTransformer

_BASE_UNITS: Final = 2_000_000  # some tens of milliseconds, whatever the template does with them
_UNITS_PER_CHAR: Final = 32
_UNITS_PER_MESSAGE: Final = 20_000
_VISITS_PER_MESSAGE: Final = 4  # how often a template may run over its own text for a message
_MAX_NODES: Final = 5_000  # templates of use have a few hundred to two thousand

_STEP: Final = 100  # an iteration or a call
_ITEM: Final = 16  # an element of a list
_NODE: Final = 10  # an expression or statement in a loop's body, of which not all are charged when they run
_MAX_WIDTH: Final = 4096
_MAX_PRECISION: Final = 32
_MAX_BITS: Final = 4096  # of a whole number

_REMOVED_FILTERS: Final = ("wordwrap", "urlize", "xmlattr", "pprint", "filesizeformat", "striptags", "center", "random")
# They hand on references, or look at one end.
_FILTERS_OF_ONE_STEP: Final = frozenset({"length", "count", "first", "last", "default", "d", "attr"})
_SHALLOW_FILTERS: Final = frozenset(
    {"list", "reverse", "items", "map", "select", "reject", "selectattr", "rejectattr", "batch", "slice"}
)
_CHARGED_TESTS: Final = frozenset(
    {"eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">=", "in"}
    | {"lower", "upper"}  # of a value's text
)
_REMOVED_METHODS: Final = frozenset({"translate", "maketrans", "expandtabs", "format_map", "encode"})
# In the worst case they look at each character of the text for each of their argument.
_QUADRATIC_METHODS: Final = frozenset({"strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"})
_PADDING_METHODS: Final = frozenset({"center", "ljust", "rjust", "zfill"})
_SHALLOW_METHODS: Final = frozenset({"get", "items", "keys", "values", "copy"})
# Unions are built anew each time that they are written out.
_TEXTS: Final = (str, bytes)
_VIEWS: Final[tuple[type, ...]] = (type({}.items()), type({}.keys()), type({}.values()))
_CONTAINERS: Final[tuple[type, ...]] = (list, tuple, set, frozenset, *_VIEWS)
_LONG_NUMBER: Final = re.compile(r"\d{4,}|\*")
_NESTED_FIELD: Final = re.compile(r"\{[^{}]*\{")


class TemplateTooCostlyError(jinja2.TemplateError):
    """A rendering has used its budget up, or has asked for something without a bound."""


class Budget:
    """What is left of one rendering's units."""

    def __init__(self, units: int) -> None:
        self.left = units

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
                weight += 1 + (item.bit_length() >> 3)
            elif isinstance(item, dict):
                weight += 1 + 2 * _ITEM * len(item)
                self._check(weight)
                waiting += item.keys()
                waiting += item.values()
            elif isinstance(item, _CONTAINERS):
                held = cast("Collection[Any]", item)
                weight += 1 + _ITEM * len(held)
                self._check(weight)
                waiting += held
            elif isinstance(item, jinja2.utils.Namespace):
                weight += 1 + _ITEM
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
    per_message = _UNITS_PER_MESSAGE + _VISITS_PER_MESSAGE * _NODE * min(num_nodes, _MAX_NODES)
    return Budget(_BASE_UNITS + _UNITS_PER_CHAR * num_chars + per_message * num_messages)


_BUDGET: ContextVar[Budget] = ContextVar("torchrelay_template_budget")


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Everything that templates do inside is charged to `budget`."""
    token = _BUDGET.set(budget)
    try:
        yield
    finally:
        _BUDGET.reset(token)


class BudgetedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja's sandbox, which keeps templates from reaching out, with every cost charged to the current budget."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})  # the others make nothing larger than they get

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_charge_output, **options)
        self.num_nodes = 0  # of the last template that was compiled
        del self.globals["lipsum"]
        for name in _REMOVED_FILTERS:
            del self.filters[name]

    def seal(self) -> None:
        """Charge for the filters and tests that are there now; to be called once, when all are."""
        filters = {name: _charged_filter(name, function) for name, function in self.filters.items()}
        self.filters = {**filters, **_INTERNAL}
        self.tests = {
            name: _charged_test(cast("Callable[..., Any]", function)) if name in _CHARGED_TESTS else function
            for name, function in self.tests.items()
        }

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what a template, a macro or a block has put out."""
        budget = _BUDGET.get()
        kept: list[str] = []
        for piece in pieces:
            budget.charge(_ITEM + len(piece))
            kept.append(piece)
        return "".join(kept)

    def _parse(self, source: str, name: str | None, filename: str | None) -> n.Template:
        tree = super()._parse(source, name, filename)
        self.num_nodes = _count(tree)
        charging: n.Template = _Charging().visit(tree)
        return charging

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = _BUDGET.get()
        budget.charge(_STEP)
        is_shallow = isinstance(__obj, jinja2.runtime.Macro | jinja2.runtime.LoopContext)
        # jinja wraps str.format, and the wrapper tells what it wraps.
        method = getattr(__obj, "__wrapped__", __obj)
        if isinstance(method, BuiltinMethodType | MethodType):
            is_shallow = _before_method(budget, method, args, kwargs)
        if is_shallow:
            return super().call(__context, __obj, *args, **kwargs)
        budget.charge(budget.weigh((args, kwargs)))
        result = super().call(__context, __obj, *args, **kwargs)
        budget.charge(budget.weigh(result))
        return result

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        if operator == "+" and type(left) is str and type(right) is str:  # most of what templates do
            budget.charge(_STEP + len(left) + len(right))
            return left + right
        budget.charge(_STEP)
        if isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
            _before_sequences(budget, operator, left, right)
        elif operator == "**":
            _check_power(left, right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > _MAX_BITS:
            _refuse("a whole number of the chat template has too many digits")
        budget.charge(budget.weigh(result))
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # to be hashed with all that it holds
            budget = _BUDGET.get()
            budget.charge(budget.weigh(argument))
        return super().getitem(obj, argument)


class _Charging(NodeTransformer):
    """Puts charges into a template: into bodies that can run often, and around what makes or compares values."""

    def visit_For(self, node: n.For) -> n.Node:  # noqa: N802 - the visitor's names
        units = _STEP + _NODE * _count(node)
        self.generic_visit(node)
        node.body.insert(0, _statement("charge", units))
        if node.test is not None:
            node.test = n.And(_call("charge", n.Const(units)), node.test)
        return node

    def visit_Macro(self, node: n.Macro) -> n.Node:  # noqa: N802
        return self._macro(node)

    def visit_CallBlock(self, node: n.CallBlock) -> n.Node:  # noqa: N802
        return self._macro(node)

    def visit_Block(self, node: n.Block) -> n.Node:  # noqa: N802
        return self._macro(node)  # it can call itself by self.NAME()

    def _macro(self, node: n.Macro | n.CallBlock | n.Block) -> n.Node:
        for name in node.find_all(n.Name):
            if name.name in ("varargs", "kwargs"):
                raise jinja2.TemplateSyntaxError(f"{name.name} is not served", name.lineno)
        units = _STEP + _NODE * _count(node)
        self.generic_visit(node)
        node.body.insert(0, _statement("charge", units))
        return node

    def visit_Concat(self, node: n.Concat) -> n.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_List(self, node: n.List) -> n.Node:  # noqa: N802
        return self._literal(node)

    def visit_Dict(self, node: n.Dict) -> n.Node:  # noqa: N802
        return self._literal(node)

    def visit_Tuple(self, node: n.Tuple) -> n.Node:  # noqa: N802
        if node.ctx != "load":
            return node
        return self._literal(node)

    def _literal(self, node: n.Expr) -> n.Node:
        self.generic_visit(node)
        return node if all(_is_fixed(child) for child in node.iter_child_nodes()) else _call("charged", node)

    def visit_Getitem(self, node: n.Getitem) -> n.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("charged_slice", node) if isinstance(node.arg, n.Slice) else node

    def visit_Compare(self, node: n.Compare) -> n.Node:  # noqa: N802
        self.generic_visit(node)
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        is_membership = any(operand.op in ("in", "notin") for operand in node.ops)
        if len(operands) == 2 and not is_membership and any(isinstance(operand, n.Const) for operand in operands):
            return node  # a comparison with a fixed text costs no more than that text
        node.expr = _call("charged", node.expr)
        for operand in node.ops:
            operand.expr = _call("charged", operand.expr)
        return node


def _is_fixed(node: n.Node) -> bool:
    if isinstance(node, n.Const):
        return True
    is_container = isinstance(node, n.Pair | n.List | n.Tuple | n.Dict)
    return is_container and all(_is_fixed(child) for child in node.iter_child_nodes())


def _count(node: n.Node) -> int:
    return sum(1 for _ in node.find_all(n.Node))


def _call(name: str, value: n.Expr, *more: n.Expr) -> n.Filter:
    """A call of one of ours, as a filter, which jinja calls without a detour; its name no template can write."""
    return n.Filter(value, f" {name}", list(more), [], None, None)


def _statement(name: str, units: int) -> n.ExprStmt:
    return n.ExprStmt(_call(name, n.Const(units)))


# With a context they are not taken for constant expressions, which are computed once and for all.
@jinja2.pass_context
def _charge(_: jinja2.runtime.Context, units: int) -> bool:
    """At the beginning of every body of a loop or macro; true, so that it can stand in a condition."""
    _BUDGET.get().charge(units)
    return True


@jinja2.pass_context
def _charged(_: jinja2.runtime.Context, value: object) -> object:
    """Return a value that the template has just put together, or is about to compare."""
    budget = _BUDGET.get()
    budget.charge(_STEP + budget.weigh(value))
    return value


@jinja2.pass_context
def _charged_slice(_: jinja2.runtime.Context, value: object) -> object:
    """Return a part of a sequence; what stands in it is not copied."""
    _BUDGET.get().charge(_STEP + _shallow(value))
    return value


@jinja2.pass_context
def _joined(_: jinja2.runtime.Context, *values: object) -> str:
    """The operator ~."""
    budget = _BUDGET.get()
    budget.charge(_STEP + budget.weigh(values))
    return "".join(map(str, values))


_INTERNAL: Final[Mapping[str, Callable[..., Any]]] = {
    " charge": _charge,
    " charged": _charged,
    " charged_slice": _charged_slice,
    " joined": _joined,
}


def _shallow(value: object) -> int:
    """Return the units of looking at each element of a value once, not into them."""
    return _ITEM * len(value) if isinstance(value, str | list | tuple | dict | range) else _ITEM


def _refuse(message: str) -> NoReturn:
    raise TemplateTooCostlyError(message)


def _charge_output(value: Any) -> Any:
    """Every {{ expression }} passes here before it becomes text."""
    budget = _BUDGET.get()
    budget.charge(_STEP + (len(value) if type(value) is str else budget.weigh(value)))
    return value


def _before_sequences(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge for an operator with a text or list on a side, by the size of what it will make."""
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(times, int):
                budget.charge(budget.weigh(sequence) * max(0, times))
    elif operator == "%" and isinstance(left, str):
        _check_format(budget, left, (right,))
    else:
        budget.charge(budget.weigh((left, right)))


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * max(0, exponent) > _MAX_BITS:
        _refuse("a power in the chat template has too many digits")


def _check_format(budget: Budget, template: str, values: object) -> None:
    """A field takes its value's text and up to three digits of padding; wider ones and computed widths are refused."""
    if _LONG_NUMBER.search(template) or _NESTED_FIELD.search(template):
        _refuse("a format in the chat template has a width without a bound")
    num_fields = template.count("%") + template.count("{")
    budget.charge(len(template) + num_fields * (1000 + budget.weigh(values)))


def _before_method(budget: Budget, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Charge for a method of a value; return whether its arguments and result need no weighing."""
    owner, name = method.__self__, method.__name__
    if isinstance(owner, jinja2.runtime.LoopContext | jinja2.utils.Cycler):
        return False
    if isinstance(owner, dict):
        if name in _SHALLOW_METHODS:
            budget.charge(_ITEM if name == "get" else _shallow(owner))
            return True
    elif isinstance(owner, str):
        if name in _REMOVED_METHODS:
            _refuse(f"the method {name} of texts is not there for chat templates")
        budget.charge(len(owner))
        _before_text_method(budget, owner, name, args, kwargs)
        return False
    elif not isinstance(owner, list | tuple):
        _refuse(f"the method {name} is not there for chat templates")
    budget.charge(budget.weigh(owner))
    return False


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
        _refuse(f"a width in the chat template is over {_MAX_WIDTH}")


def _check_replacement(budget: Budget, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    old, new = (*args, kwargs.get("old", ""), kwargs.get("new", ""))[:2] if len(args) < 2 else args[:2]
    times = len(text) // max(1, len(str(old))) + 1
    budget.charge(times * len(str(new)))


def _check_join(budget: Budget, separator: str, items: Any) -> None:
    if isinstance(items, str | list | tuple | dict | range):
        budget.charge(len(items) * (len(separator) + _ITEM))
    else:
        _refuse("join takes a list in chat templates")


def _charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter with its cost charged; it stays what jinja passes context or environment to."""
    num_passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.charge(_STEP)
        passed, operands = args[:num_passed], list(args[num_passed:])
        if name in _FILTERS_OF_ONE_STEP:
            return function(*args, **kwargs)
        if operands and isinstance(operands[0], Iterator):  # its size is not known before
            operands[0] = list(_each_charged(budget, operands[0]))
        if name in _SHALLOW_FILTERS:
            _check_widths((*operands[1:], *kwargs.values()))
            budget.charge(sum(_shallow(operand) for operand in (*operands, *kwargs.values())))
            return function(*passed, *operands, **kwargs)
        budget.charge(budget.weigh((operands, kwargs)))
        _before_filter(budget, name, operands, kwargs)
        result = function(*passed, *operands, **kwargs)
        budget.charge(budget.weigh(result))
        return result

    return charged


def _each_charged(budget: Budget, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        budget.charge(_STEP)
        yield item


def _before_filter(budget: Budget, name: str, operands: list[Any], kwargs: Mapping[str, Any]) -> None:
    if not operands:
        return
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
        budget.charge(_shallow(value) * (1 + sum(len(item) for item in rest if isinstance(item, str)) + len(separator)))
    elif name == "format":
        _check_format(budget, str(value), (operands[1:], kwargs))
    elif name == "trim":
        _charge_quadratic(budget, str(value), rest)
    elif name == "round" and any(isinstance(item, int) and abs(item) > _MAX_PRECISION for item in rest):
        _refuse(f"a precision in the chat template is over {_MAX_PRECISION}")
    elif name == "sum" and any(isinstance(item, str | list | tuple) for item in rest):
        _refuse("sum takes numbers in chat templates")  # of lists it copies all that it has, again and again


def _charged_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.charge(_STEP + budget.weigh((args, kwargs)))
        return function(*args, **kwargs)

    return charged

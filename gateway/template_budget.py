"""A sandbox for chat templates that bounds what one rendering costs, in time and in memory.

A template comes with a model and is a program: it can loop, call itself, double a text forty times, or ask for a number
with a billion digits. Nothing outside can stop a thread that does so, so the sandbox counts. Each iteration, call,
filter and operator is charged for what it is about to do and to make, before it does it, and a rendering that has used
its budget up ends with an error. Only what is known to take time and room linear in its operands is let through; what
grows faster has its result estimated first, and what cannot be estimated is not there.

What a unit is, and how many a conversation has, stands in `template_units`; what filters, tests and methods cost, in
`template_charges`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import BuiltinMethodType, MethodType
from typing import Any, Final, cast

import jinja2
import jinja2.nodes as n
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2.visitor import NodeTransformer

from gateway.template_charges import (
    before_function,
    before_method,
    before_sequences,
    charged_filter,
    charged_test,
    check_power,
)
from gateway.template_units import BUDGET, ITEM, NODE, STEP, shallow

_REMOVED_FILTERS: Final = ("wordwrap", "urlize", "xmlattr", "pprint", "filesizeformat", "striptags", "center", "random")
_MAX_COMPUTED_KEYS: Final = 128


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
        filters = {name: charged_filter(name, function) for name, function in self.filters.items()}
        self.filters = {**filters, **_INTERNAL}
        self.tests = {
            name: charged_test(name, cast("Callable[..., Any]", function)) for name, function in self.tests.items()
        }

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what a template, a macro or a block has put out."""
        budget = BUDGET.get()
        kept: list[str] = []
        for piece in pieces:
            budget.charge(ITEM + len(piece))
            kept.append(piece)
        return "".join(kept)

    def _parse(self, source: str, name: str | None, filename: str | None) -> n.Template:
        tree = super()._parse(source, name, filename)
        self.num_nodes = _count(tree)
        charging: n.Template = _Charging().visit(tree)
        return charging

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = BUDGET.get()
        budget.charge(2 * STEP)
        is_shallow = isinstance(__obj, jinja2.runtime.Macro | jinja2.runtime.LoopContext)
        # jinja wraps str.format, and the wrapper tells what it wraps.
        method = getattr(__obj, "__wrapped__", __obj)
        if isinstance(method, BuiltinMethodType | MethodType):
            is_shallow = before_method(budget, method, args, kwargs)
        elif not is_shallow:
            before_function(budget, __obj, args)
        if is_shallow:
            return super().call(__context, __obj, *args, **kwargs)
        budget.charge(budget.weigh((args, kwargs)))
        result = super().call(__context, __obj, *args, **kwargs)
        budget.charge(budget.weigh(result))
        return result

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        budget = BUDGET.get()
        if operator == "+" and type(left) is str and type(right) is str:  # most of what templates do
            budget.charge(STEP + len(left) + len(right))
            return left + right
        budget.charge(STEP)
        if isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
            before_sequences(budget, operator, left, right)
        elif operator == "**":
            check_power(left, right)
        result = super().call_binop(context, operator, left, right)
        budget.charge(budget.weigh(result))
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As templates write it, and as filters with an attribute do for each part of its name, for each item."""
        budget = BUDGET.get()
        # Where the item is not found, an attribute is looked for, and what that may be.
        budget.charge(STEP if isinstance(obj, dict | list | tuple) else 3 * STEP)
        if isinstance(argument, tuple):  # to be hashed with all that it holds
            budget.charge(budget.weigh(argument))
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        BUDGET.get().charge(STEP if isinstance(obj, dict) else 2 * STEP)
        return super().getattr(obj, attribute)


class _Charging(NodeTransformer):
    """Puts charges into a template: into bodies that can run often, and around what makes or compares values."""

    def visit_For(self, node: n.For) -> n.Node:  # noqa: N802 - the visitor's names
        units = STEP + NODE * _count(node)
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
        units = STEP + NODE * _count(node)
        self.generic_visit(node)
        node.body.insert(0, _statement("charge", units))
        return node

    def visit_Concat(self, node: n.Concat) -> n.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_List(self, node: n.List) -> n.Node:  # noqa: N802
        return self._literal(node)

    def visit_Dict(self, node: n.Dict) -> n.Node:  # noqa: N802
        # Numbers, and tuples of them, can be chosen so that a map needs the square of their number.
        computed = [pair for pair in node.items if not (isinstance(pair.key, n.Const) and type(pair.key.value) is str)]
        if len(computed) > _MAX_COMPUTED_KEYS:
            raise jinja2.TemplateSyntaxError(f"over {_MAX_COMPUTED_KEYS} keys that are no fixed texts", node.lineno)
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
    BUDGET.get().charge(units)
    return True


@jinja2.pass_context
def _charged(_: jinja2.runtime.Context, value: object) -> object:
    """Return a value that the template has just put together, or is about to compare."""
    budget = BUDGET.get()
    budget.charge(STEP + budget.weigh(value))
    return value


@jinja2.pass_context
def _charged_slice(_: jinja2.runtime.Context, value: object) -> object:
    """Return a part of a sequence; what stands in it is not copied."""
    BUDGET.get().charge(STEP + shallow(value))
    return value


@jinja2.pass_context
def _joined(_: jinja2.runtime.Context, *values: object) -> str:
    """The operator ~."""
    budget = BUDGET.get()
    budget.charge(STEP + budget.weigh(values))
    return "".join(map(str, values))


_INTERNAL: Final[Mapping[str, Callable[..., Any]]] = {
    " charge": _charge,
    " charged": _charged,
    " charged_slice": _charged_slice,
    " joined": _joined,
}


def _charge_output(value: Any) -> Any:
    """Every {{ expression }} passes here before it becomes text."""
    budget = BUDGET.get()
    budget.charge(STEP + (len(value) if type(value) is str else budget.weigh(value)))
    return value

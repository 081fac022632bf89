"""Which reasons of errors the code can send, and with which status: read from the code itself."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import common
import gateway
from common import errors
from common.errors import ServingError
from common.jobs import Reason
from gateway.status import code_of

# Where a reason is no literal: what it can be there. Anything else has to be taught here.
_COMPUTED: Final[Mapping[str, frozenset[str]]] = {
    "self.reason": frozenset(),  # of the error itself
    "first.reason": frozenset(),  # of a violation, which is read where it is noted
    "v.reason": frozenset(),
    "error.reason": frozenset(),  # of an error that is read where it is raised, GrammarError among them
    "reason": frozenset(),  # handed on
    "str(record.reason)": frozenset({Reason.ALL_TOKENS_FORBIDDEN.value}),  # gateway/convert.py
    # gateway/structured.py, of what convert.failure_of gives it: the unsupported ones have gone before.
    "str(reason)": frozenset(
        reason.value for reason in Reason if reason.is_of_grammar and reason is not Reason.STRUCTURED_OUTPUT_UNSUPPORTED
    ),
    "status.decode()": frozenset(),  # of common/job_queue.py, read from its table
}


def kinds() -> dict[str, type[ServingError]]:
    """Return every class of errors of gateway and common by its name."""
    for package in (common, gateway):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    found: dict[str, type[ServingError]] = {}
    waiting = [ServingError]
    while waiting:
        kind = waiting.pop()
        found[kind.__name__] = kind
        waiting += kind.__subclasses__()
    return found


def reasons() -> dict[str, set[str]]:
    """Return the names of the statuses with which each reason can be sent."""
    found: dict[str, set[str]] = defaultdict(set)
    classes = kinds()
    for package in (common, gateway):
        for path in sorted(Path(next(iter(package.__path__))).rglob("*.py")):
            for status, reason in of_source(path.read_text(), classes):
                found[reason].add(status)
    return dict(found)


def of_source(source: str, classes: Mapping[str, type[ServingError]]) -> Iterator[tuple[str, str]]:
    """Yield status and reason of each error that a module makes. Raises LookupError for one that cannot be read."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    if "_REFUSALS" in constants and isinstance(constants["_REFUSALS"], ast.Dict):
        for key in constants["_REFUSALS"].keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, bytes):
                yield _status(errors.QueueFull), key.value.decode()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "failure_reason":  # of a grammar
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from ((_status(errors.InvalidRequest), text) for text in _texts(inner.value, constants))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name | ast.Attribute):
            name = node.exc.id if isinstance(node.exc, ast.Name) else node.exc.attr
            if name in classes:
                yield _status(classes[name]), classes[name].default_reason
        if isinstance(node, ast.Call):
            yield from _of_call(node, classes, constants)


def _of_call(
    node: ast.Call, classes: Mapping[str, type[ServingError]], constants: Mapping[str, ast.expr]
) -> Iterator[tuple[str, str]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    given = next((keyword.value for keyword in node.keywords if keyword.arg == "reason"), None)
    invalid = _status(errors.InvalidRequest)
    if name in classes:
        kind: Any = classes[name]
        named = [kind.default_reason] if given is None else _texts(given, constants)
        yield from ((_status(kind), reason) for reason in named)
    elif name == "add" and getattr(getattr(node.func, "value", None), "id", "") in ("bad", "violations"):
        named = _texts(node.args[2], constants) if len(node.args) > 2 else []
        yield from ((invalid, reason) for reason in named or ["FIELD_OUT_OF_RANGE"])
    elif name == "FieldViolation" and len(node.args) > 2:
        yield from ((invalid, reason) for reason in _texts(node.args[2], constants))
    elif name == "GrammarError":
        yield from ((invalid, reason) for reason in _texts(node.args[0], constants))
    elif name == "ErrorInfo" and given is not None:
        yield from (("INTERNAL", reason) for reason in _texts(given, constants))


def _texts(node: ast.expr, constants: Mapping[str, ast.expr]) -> list[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, constants), *_texts(node.orelse, constants)]
    if isinstance(node, ast.Name) and node.id in constants:
        return _texts(constants[node.id], constants)
    try:
        return sorted(_COMPUTED[ast.unparse(node)])
    except KeyError:
        raise LookupError(f"line {node.lineno}: what `{ast.unparse(node)}` can be is not known here") from None


def _status(kind: type[ServingError]) -> str:
    return code_of(kind.__new__(kind)).name

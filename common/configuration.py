"""What is set, for all programs of a deployment: every setting with its value and source, and what is wrong with them.

Settings classes of other packages are found by entry points of the group `torchrelay.settings`, each of which names a
`Program`: this package knows neither gateway nor worker.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Final

from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings

from common.sealing import EncryptionSettings, Sealer
from common.settings import PREFIX, unknown_variables
from common.startup import SHARED_SETTINGS

ENTRY_POINTS: Final = "torchrelay.settings"
MASK: Final = "***"
_CREDENTIALS_IN_URL: Final = re.compile(r"(?<=://)[^/@\s]*@")


@dataclass(frozen=True, slots=True)
class Program:
    """The settings of one program. `check` raises ValueError where they contradict each other, or name bad files."""

    name: str
    classes: tuple[type[BaseSettings], ...]
    check: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting in force."""

    variable: str
    value: Any  # as JSON holds it; secrets are masked
    is_set: bool  # by a variable, and so not by default
    description: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with what is set, and what to do about it; one line each."""

    variable: str  # "" where it is not one alone
    what: str
    fix: str


def programs() -> list[Program]:
    """What all programs share, and the programs that are installed."""
    found = [point.load() for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)]
    return [Program("process", SHARED_SETTINGS, lambda: Sealer.from_settings(EncryptionSettings())), *found]


def settings_in_force(classes: Iterable[type[BaseSettings]], environment: Mapping[str, str]) -> list[Setting]:
    """Every setting, by class. One that is invalid is shown as it was given; `problems` says what is wrong with it."""
    given = {name.upper() for name in environment}
    found: list[Setting] = []
    for kind in classes:
        values = _values(kind, environment)
        for name, field in kind.model_fields.items():
            variable = variable_of(kind, name)
            found.append(Setting(variable, _shown(values[name]), variable in given, field.description or ""))
    return found


def problems(known: Sequence[Program], environment: Mapping[str, str]) -> list[Problem]:
    """All that is wrong with what is set: names that nothing reads, values that are none, and contradictions."""
    classes = tuple(dict.fromkeys(kind for program in known for kind in program.classes))
    found = [
        Problem(
            unknown.name,
            f"{unknown.name} is read by nothing",
            f"rename it to {unknown.nearest}" if unknown.nearest else "unset it; `torchrelay config show` lists all",
        )
        for unknown in unknown_variables(environment, classes)
    ]
    invalid = {kind: _invalid(kind) for kind in classes}
    found += [problem for faults in invalid.values() for problem in faults]
    for program in known:
        if any(invalid[kind] for kind in program.classes):
            continue  # what contradicts what is to be seen once each is right
        try:
            program.check()
        except ValidationError:
            continue  # of a class of another program, which says so itself
        except (ValueError, OSError) as error:
            found.append(Problem("", _one_line(str(error)), f"put it right: no {program.name} starts like this"))
    return found


def variable_of(kind: type[BaseSettings], name: str) -> str:
    """The variable of a field, in upper case."""
    return (kind.model_config.get("env_prefix", PREFIX) + name).upper()


def masked(text: str) -> str:
    """A text without the user and password of any address in it."""
    return _CREDENTIALS_IN_URL.sub(f"{MASK}@", text)


def _values(kind: type[BaseSettings], environment: Mapping[str, str]) -> dict[str, Any]:
    try:
        settings = kind()
    except ValidationError:
        given = {name.upper(): value for name, value in environment.items()}
        return {
            name: _as_given(
                kind, name, given.get(variable_of(kind, name)), field.get_default(call_default_factory=True)
            )
            for name, field in kind.model_fields.items()
        }
    return {name: getattr(settings, name) for name in kind.model_fields}


def _as_given(kind: type[BaseSettings], name: str, value: str | None, default: Any) -> Any:
    if value is None:
        return default
    return SecretStr(value) if "SecretStr" in str(kind.model_fields[name].annotation) else value


def _shown(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return MASK if value.get_secret_value() else ""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, tuple | list):
        return [_shown(item) for item in value]
    return masked(str(value))


def _invalid(kind: type[BaseSettings]) -> list[Problem]:
    try:
        kind()
    except ValidationError as error:
        return [_fault(kind, fault) for fault in error.errors(include_url=False, include_input=False)]
    return []


def _fault(kind: type[BaseSettings], fault: Any) -> Problem:
    name = str(fault["loc"][0]) if fault["loc"] else ""
    field = kind.model_fields.get(name)
    if field is None:  # of several together
        prefix = kind.model_config.get("env_prefix", PREFIX)
        return Problem("", f"{prefix}*: {_one_line(fault['msg'])}", "change one of them")
    variable = variable_of(kind, name)
    fix = f"{_one_line(field.description or '')} Default: {_shown(field.get_default(call_default_factory=True))}"
    return Problem(variable, f"{variable}: {_one_line(fault['msg'])}", fix)


def _one_line(text: str) -> str:
    return masked(" ".join(text.split())).removeprefix("Value error, ")

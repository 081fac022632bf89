"""Objectives of one request: how long it may take to its first token, between tokens, and in all. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torchrelay.cli.bench.samples import Sample

_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}

# What is held against the bound; None where a request has no such time, which then keeps to any.
_MEASURES: Final[Mapping[str, Callable[[Sample], float | None]]] = {
    "ttft": lambda sample: sample.first_token_s,
    "itl": lambda sample: max(sample.token_gaps(), default=None),
    "tpot": lambda sample: sample.tpot_s,
    "e2e": lambda sample: sample.total_s,
}


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds in seconds by name: `ttft`, `itl` (the longest gap between two tokens), `tpot` (their mean), `e2e`."""

    bounds_s: Mapping[str, float]

    def is_met_by(self, sample: Sample) -> bool:
        """Whether a request kept to every bound."""
        times = ((_MEASURES[name](sample), bound) for name, bound in self.bounds_s.items())
        return all(time is None or time <= bound for time, bound in times)

    def as_ms(self) -> dict[str, float]:
        return {name: round(bound * 1000, 3) for name, bound in self.bounds_s.items()}

    @classmethod
    def from_ms(cls, bounds: Mapping[str, float]) -> Slo:
        return cls({name: bound / 1000 for name, bound in bounds.items() if name in _MEASURES})

    def __str__(self) -> str:
        return ", ".join(f"{name} {_shown(bound)}" for name, bound in self.bounds_s.items())


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as 500ms, 1.5s or 2min. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s|min)", text.strip())
    if found is None or not float(found[1]) > 0:
        raise ValueError(f"{text.strip() or 'nothing'} is no time above 0 with a unit, such as 500ms, 1.5s or 2min")
    return float(found[1]) * _UNITS[found[2]]


def parse_slo(text: str) -> Slo:
    """Read `ttft=500ms,itl=50ms,e2e=10s`. Raises ValueError with what is wrong."""
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in _MEASURES:
            raise ValueError(
                f"{part.strip() or 'nothing'} is none of {', '.join(f'{known}=TIME' for known in _MEASURES)}"
            )
        if name in bounds:
            raise ValueError(f"{name} is given twice")
        bounds[name] = parse_duration(value)
    return Slo(bounds)


def _shown(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1000:g} ms"

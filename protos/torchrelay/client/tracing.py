"""The caller's trace goes along with each call, where OpenTelemetry is in use: its API package is all that is asked."""

from __future__ import annotations

try:
    from opentelemetry import propagate as _propagate
except ImportError:
    _propagate = None  # type: ignore[assignment]


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata that names the current span, by the propagator that the application has set."""
    if _propagate is None:
        return ()
    carrier: dict[str, str] = {}
    _propagate.inject(carrier)
    return tuple((name.lower(), value) for name, value in carrier.items())

"""Bounds of histograms, in seconds.

As OpenTelemetry advises for servers of generative models, with finer ones below them, since small models decode in less
than 10 ms a token, and further ones above, since a request may wait in the queue for long.
"""

from __future__ import annotations

from typing import Final

FIRST_TOKEN: Final = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60, 300,
)  # fmt: skip
TOKEN: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
REQUEST: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 300, 1200,
)  # fmt: skip

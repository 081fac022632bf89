"""A gateway or worker without fairness between tenants: all share one queue, in order of arrival. For `fairness`.

Run as `ROLE=worker python -m tests.benchmarks.arrival_order`, with the settings of that role.
"""

from __future__ import annotations

import importlib
import os
import sys

from common import scripts

_CHANGES = (
    ("P .. 'q:' .. j.c .. ':' .. j.t", "P .. 'q:' .. j.c .. ':all'"),
    ("activate(j.t, j.c)", "activate('all', j.c)"),
    ("call('ZREM', P .. 'act:' .. j.c, j.t)", "call('ZREM', P .. 'act:' .. j.c, 'all')"),
)


def patch() -> None:
    """Let this process send scripts that know one tenant only. Raises ValueError where they have changed."""
    texts, libraries = scripts.sources()
    jobs = libraries["jobs"]
    for old, new in _CHANGES:
        if old not in jobs:
            raise ValueError(f"{old!r} is not in the scripts any more")
        jobs = jobs.replace(old, new)
    patched = texts, {**libraries, "jobs": jobs}
    scripts.sources = lambda: patched  # type: ignore[assignment]
    scripts.load.cache_clear()


if __name__ == "__main__":
    patch()
    sys.exit(importlib.import_module(f"{os.environ['ROLE']}.__main__").main())

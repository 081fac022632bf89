"""What the programs make of the variables that the chart sets: a misspelt one, or a bad value, is a fault."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from common.settings import PREFIX, describe_errors, variables_of
from common.startup import SHARED_SETTINGS
from gateway.identity.settings import IDENTITY_SETTINGS
from gateway.settings import GatewaySettings
from tests.deploy.charts import Rendered
from worker.engine.settings import EngineSettings
from worker.settings import WorkerSettings

_GATEWAY: Final[tuple[type[BaseSettings], ...]] = (*SHARED_SETTINGS, GatewaySettings, *IDENTITY_SETTINGS)
_WORKER: Final[tuple[type[BaseSettings], ...]] = (*SHARED_SETTINGS, WorkerSettings, EngineSettings)
READ_BY: Final[Mapping[str, tuple[type[BaseSettings], ...]]] = {
    "gateway": _GATEWAY,
    "bootstrap": _GATEWAY,
    "worker": _WORKER,
    "register": _WORKER,
}
# What is read by Python, the C library, transformers and Triton; and what another variable is put together from.
OTHERS: Final = frozenset(
    ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "TRITON_CACHE_DIR", "REDIS_ADMIN_PASSWORD")
)


def unread(rendered: Rendered) -> list[str]:
    """Variables of containers that nothing in them reads."""
    faults = []
    for container in rendered.containers():
        classes = READ_BY.get(container.spec["name"], ())
        known = OTHERS.union(*map(variables_of, classes))
        faults += [f"{container}: nothing reads {name}" for name in container.env if name not in known]
    return faults


def refused(rendered: Rendered) -> list[str]:
    """Values that the settings refuse, each container's taken together."""
    faults = []
    for container in rendered.containers():
        for settings in READ_BY.get(container.spec["name"], ()):
            faults += [f"{container}: {line}" for line in refused_values(settings, container.env)]
    return faults


def refused_values(settings: Callable[[], Any], env: Mapping[str, Any]) -> list[str]:
    """What a settings class says against an environment. What comes from a Secret is taken for a word."""
    with _environment({name: value if isinstance(value, str) else "secret" for name, value in env.items()}):
        try:
            settings()
        except ValidationError as error:
            return describe_errors(error).splitlines()
    return []


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

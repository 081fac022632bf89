"""The Lua scripts of the job protocol: loading, and running them on a shard.

Sources lie beside this module in `scripts/`. A script's text is its shebang, the schema version, the libraries that it
includes, and its body; so another schema gives another SHA-1 and never runs an older program's text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

from redis.exceptions import NoScriptError

from common import keys
from common.redis import Redis, execute
from common.wire import Argument

_INCLUDE: Final = "--@include "
_MARKS: Final = "--@marks "  # fields of the shard's meta key, which are read together with the schema version
# One that is local to the whole script, and longer than a line.
_FUNCTION: Final = re.compile(r"^local function (\w+)\(.*\)\n(?:(?: .*)?\n)*end\n", re.MULTILINE)
_COMMENT: Final = re.compile(r"--.*")
_NAME: Final = re.compile(r"\w+")
NAMES: Final = (
    "enqueue", "attach", "detach", "cancel", "get", "claim", "commit", "release", "preempt", "wanted", "owned", "leave",
    "beat_worker", "beat_gateway", "reap", "sweep", "workers", "dead_letters", "retry", "purge", "publish", "unpublish",
    "delete", "quota_reserve", "quota_settle", "batch_append", "batch_start", "batch_lease", "batch_page",
    "batch_result", "batch_cancel", "batch_delete", "batch_due", "queue_shape",
    "running", "drain", "permitted",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Script:
    """A script's whole text and the name under which the server caches it."""

    name: str
    text: str
    sha1: str


def assemble(name: str, source: str, libraries: dict[str, str]) -> Script:
    """Put a script together. Raises KeyError for a library that does not exist, ValueError without a shebang line."""
    shebang, _, body = source.partition("\n")
    if not shebang.startswith("#!lua"):
        raise ValueError(f"{name}.lua does not begin with #!lua")
    marks = next((line.split()[1:] for line in body.splitlines() if line.startswith(_MARKS)), [])
    lines = [shebang, f"-- torchrelay {name}", f"local SCHEMA = '{keys.SCHEMA_VERSION}'"]
    lines.append(f"local MARKS = {{ {', '.join(map(repr, marks))} }}")
    for line in body.splitlines():
        lines.append(libraries[line.removeprefix(_INCLUDE).strip()] if line.startswith(_INCLUDE) else line)
    text = _without_unused("\n".join(lines) + "\n")
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _without_unused(text: str) -> str:
    """Leave out functions that nothing uses: the server makes each of them anew whenever the script runs."""
    code = _COMMENT.sub("", text)
    functions = {found[1]: set(_NAME.findall(found[0])) for found in _FUNCTION.finditer(code)}
    needed: set[str] = set()
    new = functions.keys() & set(_NAME.findall(_FUNCTION.sub("", code)))
    while new:
        needed |= new
        new = functions.keys() & set().union(*(functions[name] for name in new)) - needed
    return _FUNCTION.sub(lambda found: found[0] if found[1] in needed else "", text)


@cache
def sources() -> tuple[dict[str, str], dict[str, str]]:
    """Texts of all scripts and of all libraries, by name."""
    folder = resources.files("common") / "scripts"
    texts = {name: (folder / f"{name}.lua").read_text() for name in NAMES}
    libraries = {name: (folder / f"lib_{name}.lua").read_text() for name in ("base", "jobs", "claims", "batches")}
    return texts, libraries


@cache
def load(name: str) -> Script:
    """The script of this name, as shipped."""
    texts, libraries = sources()
    return assemble(name, texts[name], libraries)


class ScriptRunner:
    """Runs scripts on a server. `overrides` replaces texts, for tests that break a script on purpose."""

    def __init__(self, redis: Redis, overrides: dict[str, Script] | None = None) -> None:
        self._redis = redis
        self._overrides = overrides or {}

    async def run(self, name: str, key: str, *args: Argument) -> Any:
        """Run a script once on the shard (or registry) that `key` belongs to; the reply is the script's own.

        EVALSHA, and EVAL when the server does not know the script: that also teaches it. Raises redis-py's errors.
        """
        script = self._overrides.get(name) or load(name)
        try:
            return await execute(self._redis, "EVALSHA", script.sha1, 1, key, *args)
        except NoScriptError:
            return await execute(self._redis, "EVAL", script.text, 1, key, *args)

    async def run_after(self, redis: Redis, command: Sequence[Argument], name: str, key: str, *args: Argument) -> Any:
        """As `run`, over `redis`, as soon as a command that may wait has been answered; its reply is dropped.

        The server wakes who waits, and goes on with what stands behind, before it syncs what it has written: so the
        script's writes are synced together with those that ended the wait.
        """
        script = self._overrides.get(name) or load(name)
        replies = await redis.execute_together(command, ("EVALSHA", script.sha1, 1, key, *args))
        if isinstance(replies[1], NoScriptError):
            return await self.run(name, key, *args)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies[1]

    def on(self, redis: Redis) -> ScriptRunner:
        """The same scripts by way of another client."""
        return ScriptRunner(redis, self._overrides)


def as_list(reply: Any) -> Sequence[Any]:
    """A script's array reply. Raises TypeError where the server answered something else."""
    if not isinstance(reply, list):
        raise TypeError(f"expected an array from the server, not {type(reply).__name__}")
    return reply

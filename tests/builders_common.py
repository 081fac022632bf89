"""Parts for tests of the queue: jobs, clients as each role, replies that get lost, scripts broken on purpose."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis as redis_sync
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError

from common import scripts
from common.acl import Role, rules
from common.embedded import EmbeddedServer
from common.generation import EventBody, JobBody, OutputDelta, SamplingParams
from common.jobs import JobState, NewEvent, NewJob, Reason
from common.redis import connection_options
from common.settings import RedisSettings
from common.wire import WiredRedis

PASSWORD = "test"  # of every role's user; the server listens on a Unix socket in the test's own folder


def make_job(
    tenant: str = "acme",
    *,
    prompt: tuple[int, ...] = (1, 2, 3),
    max_tokens: int = 8,
    kv_tokens: int = 16,
    peak_kv_tokens: int | None = None,
    **fields: Any,
) -> NewJob:
    """A small job; further fields as in NewJob."""
    body = JobBody(prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))
    return NewJob(
        tenant=tenant,
        body=body,
        kv_tokens=kv_tokens,
        peak_kv_tokens=max(kv_tokens, peak_kv_tokens or kv_tokens + max_tokens),
        **fields,
    )


def make_event(
    generation_id: str,
    token_ids: tuple[int, ...],
    *,
    first: int = 0,
    terminal: JobState | None = None,
    reason: Reason = Reason.NONE,
    text: str = "",
    progress: bool = True,
) -> NewEvent:
    """Tokens `first` to `first + len(token_ids) - 1` of output 0."""
    body = EventBody(deltas=(OutputDelta(0, first, token_ids, text),) if token_ids else ())
    return NewEvent(
        generation_id=generation_id,
        body=body,
        completion_tokens=first + len(token_ids),
        progress=progress,
        terminal=terminal,
        reason=reason,
    )


class FlakyRedis(WiredRedis):
    """A client that can lose requests and replies: the caller gets the same error, the server has executed it or not.

    Lost requests are kept in `late`, to be executed when nobody expects them any more (see `deliver_late`).
    """

    num_requests_to_lose = 0
    num_to_lose = 0
    late: list[tuple[Any, ...]] = []  # noqa: RUF012 - replaced, never changed in place

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        if self.num_requests_to_lose > 0:
            self.num_requests_to_lose -= 1
            self.late = [*self.late, args]
            raise RedisConnectionError("the request was lost")
        reply = await super().execute_command(*args, **options)
        if self.num_to_lose > 0:
            self.num_to_lose -= 1
            raise RedisConnectionError("the reply was lost")
        return reply

    async def execute_together(self, *commands: Any) -> list[Any]:
        if self.num_requests_to_lose > 0:
            self.num_requests_to_lose -= 1
            raise RedisConnectionError("the request was lost")
        replies = await super().execute_together(*commands)
        if self.num_to_lose > 0:
            self.num_to_lose -= 1
            raise RedisConnectionError("the reply was lost")
        return replies

    async def deliver_late(self) -> None:
        """A request that was held up on its way arrives: the oldest that was lost. Its reply reaches nobody."""
        args, *self.late = self.late
        with contextlib.suppress(NoScriptError):
            await super().execute_command(*args)


@contextlib.contextmanager
def stopped(server: EmbeddedServer) -> Iterator[None]:
    """The server does not answer, until it goes on as if nothing had been."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def server_under_test() -> Path | None:
    """The server that TORCHRELAY_TEST_SERVER names, to run the same tests on another one."""
    program = os.environ.get("TORCHRELAY_TEST_SERVER")
    return Path(program) if program else None


def create_users(superuser: redis_sync.Redis) -> None:
    """A user for each role, named after it, with exactly its rules."""
    for role in Role:
        superuser.execute_command("ACL", "SETUSER", role.value, *rules(role), f">{PASSWORD}")


def flaky_client(socket_path: Path, role: Role) -> FlakyRedis:
    """A client as a role's user; redis-py's own retries are off, as in `common.redis.connect`."""
    settings = RedisSettings(url=f"unix://{socket_path}", username=role.value, password=PASSWORD)
    return FlakyRedis.from_url(settings.url, **connection_options(settings))


def mutate(script: str, old: str, new: str) -> dict[str, scripts.Script]:
    """Overrides for a ScriptRunner in which `old` is replaced in a script or (named lib_x) in a library."""
    texts, libraries = (dict(part) for part in scripts.sources())
    if script.startswith("lib_"):
        name = script.removeprefix("lib_")
        assert old in libraries[name], "the mutant's text is not in the library any more"
        libraries[name] = libraries[name].replace(old, new)
        return {name: scripts.assemble(name, text, libraries) for name, text in texts.items()}
    assert old in texts[script], "the mutant's text is not in the script any more"
    return {script: scripts.assemble(script, texts[script].replace(old, new), libraries)}

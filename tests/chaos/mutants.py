"""The real programs with one guard taken out: each must make the checker report a violation.

A mutant names the faults that meet the guard, so that a minute is enough; the checker is the same as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.chaos.patches import patch


@dataclass(frozen=True, slots=True)
class Mutant:
    """What is broken (a patch's name), and which faults show it."""

    patch: str
    kinds: tuple[str, ...]
    interval_s: float  # between two faults
    says: str


MUTANTS: Final[list[Mutant]] = []


def mutant(*kinds: str, interval_s: float = 1.5) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    """Register a patch as a mutant that these faults show."""

    def register(function: Callable[[str], None]) -> Callable[[str], None]:
        MUTANTS.append(Mutant(function.__name__, kinds, interval_s, (function.__doc__ or "").strip()))
        return patch(function)

    return register


_ZOMBIES: Final = ("pause-worker-beyond-its-lease", "partition-worker")
_LOST_REPLIES: Final = ("lose-replies-to-worker", "kill-server", "reset-connections-to-server")


def _edit(script: str, old: str, new: str) -> None:
    """Change the text of a script, or of a library named lib_x."""
    from common import scripts

    texts, libraries = scripts.sources()
    library = script.removeprefix("lib_")
    place, name = (libraries, library) if script.startswith("lib_") else (texts, script)
    assert old in place[name], f"the mutant's text is not in {script} any more"
    place[name] = place[name].replace(old, new)
    scripts.load.cache_clear()


@mutant(*_ZOMBIES)
def no_fence(_: str) -> None:
    """A commit is taken from whoever knows the number of the last event, whatever its epoch."""
    _edit(
        "commit",
        "if record and sub(record, 1, 20) == before then -- mutant: fence",
        "local owner = call('HGET', P .. 'j:' .. id, 'w')\n"
        "if not record and owner and owner ~= '' then record = call('HGET', P .. 'w:' .. owner, id) end\n"
        "if record then\n"
        "before = sub(record, 1, 20)\n"
        "local ep, n = string.match(before, '^(%d+)%-(%d+)')\n"
        "entry_id = ep .. '-' .. int(tonumber(n) + 1)\n"
        "end\n"
        "if record then",
    )


@mutant(*_LOST_REPLIES)
def no_dedup(_: str) -> None:
    """A commit whose reply was lost, and which is sent again, is taken as a further event."""
    _edit(
        "commit",
        "sub(record, 1, 20) == sub(after, 1, 20) then -- mutant: repeat\n",
        "sub(record, 1, 20) == sub(after, 1, 20) then\n"
        "    local ep, n = string.match(record, '^(%d+)%-(%d+)')\n"
        "    local next_id = ep .. '-' .. int(tonumber(n) + 1)\n"
        "    call('XADD', P .. 'j:' .. id .. ':log', next_id, 'e', e)\n"
        "    writes[num_writes + 1] = id\n"
        "    writes[num_writes + 2] = fill(next_id, 20) .. sub(after, 21, 60) .. sub(record, 61)\n"
        "    num_writes = num_writes + 2\n",
    )


@mutant(*_LOST_REPLIES, interval_s=0.5)
def no_call_id(_: str) -> None:
    """A claim that is sent again hands out further jobs, and nobody asks for those of the reply that was lost."""
    _edit("claim", "string.match(last, '^%S+') == call_id", "false")
    from common.job_claims import JobClaims

    async def owned(self: JobClaims, max_jobs: int = 0) -> list[Any]:
        return []

    JobClaims.owned = owned  # type: ignore[method-assign]


@mutant("trim-replies", "pause-gateway", "kill-worker")
def no_index_check(_: str) -> None:
    """A gateway hands on whatever comes, whether or not something before it is missing."""
    from common.jobs import ItemKind
    from gateway.progress import LogPosition, Verdict

    def judge(self: LogPosition, item: Any) -> Verdict:
        if item.kind in (ItemKind.STARTED, ItemKind.REQUEUED):
            return Verdict.NEWS
        return Verdict.READ_LOG if item.body is None else Verdict.DELIVER

    def advance(self: LogPosition, item: Any) -> Any:
        self.sequence, self.chain_hash = item.sequence, item.chain_hash
        self.note_ends(item.body.deltas)
        return item.body

    LogPosition.judge = judge  # type: ignore[method-assign]
    LogPosition.advance = advance  # type: ignore[method-assign]


@mutant("trim-replies", "pause-gateway", "lose-replies-to-gateway")
def no_reconcile(_: str) -> None:
    """A gateway that hears nothing does not look into the log."""
    from gateway.delivery import Subscription

    real = Subscription.take

    async def take(self: Subscription, timeout_s: float) -> Any:
        while not (found := await real(self, timeout_s)):
            pass
        return found

    Subscription.take = take  # type: ignore[method-assign]


@mutant("lose-replies-to-gateway", "reset-connections-to-server", "kill-gateway")
def no_idempotency(_: str) -> None:
    """A repeated key is not looked up."""
    _edit("enqueue", "local other = call('GET', digest_key)", "local other = false")


@mutant("kill-worker", "pause-worker-beyond-its-lease")
def takeover_from_the_start(_: str) -> None:
    """A worker that takes a job over decodes it anew and does not look at what stands in its log."""
    import msgspec

    from worker.holdings import Holdings

    real = Holdings.add

    def add(self: Holdings, job: Any, now: float) -> Any:
        return real(self, msgspec.structs.replace(job, events=()), now)

    Holdings.add = add  # type: ignore[method-assign]


@mutant("terminate-worker", "kill-worker")
def no_ownership(_: str) -> None:
    """Who ends a job from outside leaves it with its worker, which goes on."""
    _edit("lib_jobs", "call('HDEL', P .. 'w:' .. j.w, j.id) -- mutant: ownership", "")


@mutant("kill-worker")
def usage_twice(_: str) -> None:
    """Usage is added when a job is handed out, too."""
    _edit("claim", "  unqueue(j)\n  if j.sc == 0", "  add_usage(j, now)\n  unqueue(j)\n  if j.sc == 0")


@mutant("kill-gateway")
def any_tenant(_: str) -> None:
    """What a caller may see is not compared with whose it is."""
    _edit("attach", "if not j or j.t ~= ARGV[2] then return false end", "if not j then return false end")
    _edit("get", "(ARGV[2] == '1' or j.t == ARGV[1])", "true")


@mutant("kill-server")
def nothing_on_disk(_: str) -> None:
    """The server writes nothing down (a setting of the run, see `run_mutants`)."""


@mutant("kill-worker", "kill-all-workers")
def nobody_reaps(_: str) -> None:
    """The jobs of a dead worker stay with it."""
    _edit("reap", "for _, wid in ipairs(", "for _, wid in ipairs({} and {} or ")


@mutant("kill-server", "trim-replies")
def end_before_the_tokens(_: str) -> None:
    """A gateway believes the end when it hears of it, although tokens before it are missing."""
    from gateway.progress import LogPosition, Verdict

    real_judge, real_advance = LogPosition.judge, LogPosition.advance

    def judge(self: LogPosition, item: Any) -> Verdict:
        if item.kind.is_terminal and item.body is not None:
            return Verdict.DELIVER
        return real_judge(self, item)

    def advance(self: LogPosition, item: Any) -> Any:
        if item.kind.is_terminal:
            self.sequence, self.chain_hash = item.sequence, item.chain_hash
            self.note_ends(item.body.deltas)
            return item.body
        return real_advance(self, item)

    LogPosition.judge = judge  # type: ignore[method-assign]
    LogPosition.advance = advance  # type: ignore[method-assign]

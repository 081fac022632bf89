"""Programs of two versions on one shard: what only the later one knows is left alone by the older one.

And the opposite: programs of another schema version are refused, whatever they ask, and change nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import redis as redis_sync
from redis.exceptions import ResponseError

from common import keys, records, scripts
from common.errors import BackendRefused, GenerationNotFound
from common.generation import EventBody, OutputDelta, SamplingParams
from common.job_claims import JobClaims
from common.job_queue import START_CURSOR, JobQueue
from common.jobs import ItemKind, JobState, NewEvent, Reason, WorkerInfo
from common.registry import ModelCard, ModelRegistry
from common.scripts import ScriptRunner
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event, make_job
from tests.builders_versions import (
    LATER,
    NEW_FIELD,
    NEW_REASON,
    NEW_VALUE,
    LaterDelta,
    LaterEvent,
    LaterJobBody,
    LaterModelCard,
    LaterSampling,
    LaterUsage,
    LaterWorkerInfo,
    later_scripts,
    with_later_value,
)
from tests.integration.common import invariants
from tests.integration.common.conftest import FAST_RETRY, SHARD
from tests.integration.common.invariants import Seen

ROOM = 10_000
BODY = LaterJobBody(prompt_token_ids=(1, 2, 3), sampling=LaterSampling(max_tokens=8, seed=5))


@pytest.fixture
def later_queue(gateway_redis: FlakyRedis) -> JobQueue:
    runner = ScriptRunner(gateway_redis, later_scripts())
    return JobQueue(gateway_redis, keys.random_id(), QueueSettings(), retry=FAST_RETRY, scripts=runner)


@pytest.fixture
def later_claims(worker_redis: FlakyRedis) -> JobClaims:
    runner = ScriptRunner(worker_redis, later_scripts())
    return JobClaims(worker_redis, SHARD, keys.random_id(), QueueSettings(), retry=FAST_RETRY, scripts=runner)


def later_event(
    generation_id: str, token_ids: tuple[int, ...], first: int, *, terminal: JobState | None = None
) -> NewEvent:
    """As `make_event`, by a later worker."""
    usage = LaterUsage(3, 0, first + len(token_ids)) if terminal else None
    return NewEvent(
        generation_id=generation_id,
        body=LaterEvent((LaterDelta(0, first, token_ids, "x" * len(token_ids)),), usage),
        completion_tokens=first + len(token_ids),
        terminal=terminal,
    )


def lapse(superuser: redis_sync.Redis, claims: JobClaims) -> None:
    """The worker's lease has ended, and nobody gives it a grace."""
    superuser.zadd(keys.worker_leases(SHARD), {claims.worker_id: 0})
    superuser.hset(keys.meta(SHARD), "grace", 0)


def tokens_of(events: tuple[Any, ...]) -> list[int]:
    return [one for event in events if event.body for delta in event.body.deltas for one in delta.token_ids]


@pytest.mark.parametrize("later", LATER)
def test_what_a_later_version_adds_we_do_not_have(later: type[msgspec.Struct]) -> None:
    (ours,) = later.__bases__
    assert set(later.__annotations__).isdisjoint(ours.__struct_fields__)


async def test_a_generation_moves_between_versions_and_back(
    queue: JobQueue,
    claims: JobClaims,
    later_queue: JobQueue,
    later_claims: JobClaims,
    superuser: redis_sync.Redis,
) -> None:
    """Queued by the old gateway; worked on by a later, an old, and the later worker; resumed at the later gateway."""
    await queue.reap(SHARD)
    attach_id = keys.random_id()
    accepted = await queue.enqueue(SHARD, make_job(disconnect_grace_ms=5000), attach_id=attach_id)
    name = accepted.generation_id

    (job,) = await later_claims.claim(1, ROOM, ROOM)
    assert job.body.prompt_token_ids == (1, 2, 3)
    await later_claims.commit([later_event(name, (10, 11), 0)])
    assert (await later_claims.heartbeat(LaterWorkerInfo(model="tiny", num_running=1))).lost == {}
    (worker,) = await queue.workers(SHARD)
    assert worker.info == WorkerInfo(model="tiny", num_running=1)
    items, moved = await queue.replies({SHARD: START_CURSOR}, 1)
    assert [(item.kind, item.sequence) for item in items] == [(ItemKind.STARTED, 0), (ItemKind.EVENT, 1)]
    assert items[1].body == EventBody((OutputDelta(0, 0, (10, 11), "xx"),))

    lapse(superuser, later_claims)
    assert (await queue.reap(SHARD)).requeued == 1
    (job,) = await claims.claim(1, ROOM, ROOM)
    assert (job.epoch, job.sequence, tokens_of(job.events)) == (3, 1, [10, 11])
    await claims.commit([make_event(name, (12,), first=2)])
    assert name in (await later_claims.commit([later_event(name, (99,), 2)])).lost  # it has been fenced off

    lapse(superuser, claims)
    assert (await later_queue.reap(SHARD)).requeued == 1
    (job,) = await later_claims.claim(1, ROOM, ROOM)
    assert (job.epoch, job.sequence, tokens_of(job.events)) == (5, 2, [10, 11, 12])

    attachment = await later_queue.attach(name, "acme", 1, items[1].chain_hash, attach_id=keys.random_id())
    assert (attachment.record.gateway_id, tokens_of(attachment.events)) == (later_queue.gateway_id, [12])
    items, moved = await queue.replies(moved, 1)
    assert items[-1].kind is ItemKind.SUPERSEDED
    assert await queue.detach(name, attach_id=attach_id) is JobState.RUNNING  # the later call has the stream
    await later_claims.commit([later_event(name, (13,), 3, terminal=JobState.DONE)])
    items, _ = await later_queue.replies({SHARD: START_CURSOR}, 1)
    assert (items[-1].kind, items[-1].sequence) == (ItemKind.DONE, 3)

    found = await queue.attach(name, "acme")
    assert (found.record.state, found.record.usage.completion_tokens) == (JobState.DONE, 4)
    assert tokens_of(found.events) == [10, 11, 12, 13]
    assert [event.kind for event in found.events] == [ItemKind.EVENT, ItemKind.EVENT, ItemKind.DONE]
    check_invariants(superuser, name, Seen(list(found.events)))


def check_invariants(superuser: redis_sync.Redis, name: str, seen: Seen) -> None:
    snapshot = invariants.take_snapshot(superuser, SHARD)
    holders = {event.epoch: event.reason for event in snapshot.jobs[name].log if event.kind is ItemKind.STARTED}
    writers = {token: holders[event.epoch] for event in snapshot.jobs[name].events for token in tokens_of((event,))}
    invariants.check_all(snapshot, QueueSettings(), {name: seen}, writers)


async def test_a_later_gateways_job_is_done_by_an_old_worker_and_keeps_its_fields(
    queue: JobQueue, claims: JobClaims, later_queue: JobQueue, superuser: redis_sync.Redis
) -> None:
    job = make_job(idempotency_key="k", request_digest=b"d")
    accepted = await later_queue.enqueue(SHARD, msgspec.structs.replace(job, body=BODY))
    name = accepted.generation_id
    (claimed,) = await claims.claim(1, ROOM, ROOM)
    assert claimed.body.sampling == SamplingParams(max_tokens=8, seed=5)
    assert claimed.body.prompt_token_ids == (1, 2, 3)
    await claims.commit([make_event(name, (5,))])
    assert await claims.release([name]) == 1
    (claimed,) = await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(name, (6,), first=1, terminal=JobState.DONE)])
    again = await queue.enqueue(SHARD, make_job(idempotency_key="k", request_digest=b"d"))
    assert (again.generation_id, again.duplicate) == (name, True)
    fields = superuser.hgetall(keys.job(SHARD, name))
    assert fields[NEW_FIELD.encode()] == NEW_VALUE.encode()
    assert fields[b"b"] == records.encode_body(BODY)
    found = await later_queue.read_log(name, "acme")
    assert (found.record.state, tokens_of(found.events)) == (JobState.DONE, [5, 6])
    check_invariants(superuser, name, Seen(list(found.events)))


@pytest.mark.parametrize(
    "sampling",
    [
        LaterSampling(max_tokens=8, grammar="x"),
        with_later_value("structured_output", max_tokens=8),
        with_later_value("early_stopping", max_tokens=8, num_beams=2),
    ],
    ids=["field", "grammar kind", "early stopping"],
)
async def test_a_job_with_a_parameter_that_a_worker_does_not_know_is_left_to_others(
    claims: JobClaims, later_queue: JobQueue, superuser: redis_sync.Redis, sampling: SamplingParams
) -> None:
    body = LaterJobBody(prompt_token_ids=(1, 2, 3), sampling=sampling)
    later = await later_queue.enqueue(SHARD, msgspec.structs.replace(make_job(), body=body))
    plain = await later_queue.enqueue(SHARD, make_job())
    # What it can do it does; the other one waits again, as if nobody had claimed it, and this worker lets others try.
    assert [job.generation_id for job in await claims.claim(2, ROOM, ROOM)] == [plain.generation_id]
    assert claims.is_paused
    record = await later_queue.get(later.generation_id, "acme")
    assert (record.state, record.attempts, record.num_claims) == (JobState.QUEUED, 0, 0)
    assert superuser.hgetall(keys.job(SHARD, later.generation_id))[b"b"] == records.encode_body(body)


@pytest.mark.parametrize("by_later", [False, True])
async def test_each_version_ends_what_the_other_runs(
    queue: JobQueue,
    claims: JobClaims,
    later_queue: JobQueue,
    later_claims: JobClaims,
    superuser: redis_sync.Redis,
    by_later: bool,
) -> None:
    """Cancel, deadline and the gateway's own upkeep reach jobs, and news of them the gateway, across versions."""
    ending, listening = (later_queue, queue) if by_later else (queue, later_queue)
    holding = claims if by_later else later_claims
    cancelled = await listening.enqueue(SHARD, make_job())
    late = await listening.enqueue(SHARD, make_job())
    await holding.claim(2, ROOM, ROOM)
    assert (await ending.cancel(cancelled.generation_id, "acme")).state is JobState.CANCELLED
    superuser.zadd(keys.deadlines(SHARD), {late.generation_id: 1})
    assert (await ending.sweep(SHARD)).expired == 1
    assert set((await holding.commit()).lost) == {cancelled.generation_id, late.generation_id}
    items, _ = await listening.replies({SHARD: START_CURSOR}, 1)
    ends = {item.generation_id: (item.kind, item.reason) for item in items if item.kind.is_terminal}
    assert ends == {
        cancelled.generation_id: (ItemKind.CANCELLED, Reason.CANCELLED),
        late.generation_id: (ItemKind.EXPIRED, Reason.TIME_LIMIT),
    }


async def test_the_later_scripts_are_others_and_really_write_more(
    later_queue: JobQueue, later_claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    assert {script.sha1 for script in later_scripts().values()}.isdisjoint(
        {scripts.load(name).sha1 for name in scripts.NAMES}
    )
    name = (await later_queue.enqueue(SHARD, make_job())).generation_id
    await later_claims.claim(1, ROOM, ROOM)
    await later_claims.commit([later_event(name, (1,), 0)])
    await later_queue.cancel(name, "acme")
    log = superuser.xrange(keys.job_log(SHARD, name))
    assert [list(entry)[-1] for _, entry in log] == [NEW_FIELD.encode()] * 3
    packed = [entry[b"b"] for _, entry in superuser.xrange(keys.reply_stream(SHARD, later_queue.gateway_id))]
    items = [item for part in packed for item in msgspec.msgpack.decode(part)]
    assert [(len(item), item[-1]) for item in items] == [(8, NEW_VALUE)] * 3


async def test_a_reason_that_only_a_later_version_knows_is_no_error(
    queue: JobQueue, later_claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    name = (await queue.enqueue(SHARD, make_job())).generation_id
    await later_claims.claim(1, ROOM, ROOM)
    event = make_event(name, (1,), terminal=JobState.FAILED)
    event = msgspec.structs.replace(event, reason=_LaterReason())
    await later_claims.commit([event])
    record = await queue.get(name, "acme")
    assert (record.state, record.reason) == (JobState.FAILED, Reason.NONE)
    assert superuser.hget(keys.job(SHARD, name), "y") == NEW_REASON.encode()


class _LaterReason:
    value = NEW_REASON


async def test_a_later_model_card_is_read(worker_redis: FlakyRedis, gateway_redis: FlakyRedis) -> None:
    fields = {"name": "tiny", "revision": "r1", "shard": SHARD, "vocab_size": 9, "context_tokens": 8}
    await ModelRegistry(worker_redis, retry=FAST_RETRY).publish(LaterModelCard(**fields, max_output_tokens=4), {})
    cards = await ModelRegistry(gateway_redis, retry=FAST_RETRY).list()
    assert cards == [ModelCard(**fields, max_output_tokens=4)]


# -- another schema version

GID, WID = "g" * 26, "w" * 26
NAME = f"{SHARD}.{'n' * 26}"
LETTER = f"{SHARD}.{'l' * 26}"
# What each script of the queue is asked.
ASKED: dict[str, tuple[Any, ...]] = {
    "enqueue": (
        f"{SHARD}.{'m' * 26}", "acme", "", 1, 1, GID, 90_000, 0, 90_000, 1, 1, 16, 16, "", "", "", b"",
        9, 9, 9, 90_000, 90_000, "an attach id", 90_000, 0, "", "", 9, 9,
    ),
    "attach": (NAME, "acme", GID, 0, "", 9, 999, 90_000, 90_000, "another attach id", 0),
    "detach": (NAME, GID, "an attach id"),
    "cancel": (NAME, "acme", 0),
    "get": ("acme", 0, 0, NAME),
    "claim": (WID, "call", 90_000, 9, 999, 999, 9999, 0, 9, 0, 0.05),
    "commit": (WID, 90_000, 0, 0, NAME, "1-"),
    "release": (WID, 9, NAME, 1),
    "preempt": (WID, 9, NAME, 1),
    "wanted": (999,),
    "owned": (WID, 9, 999),
    "leave": (WID,),
    "beat_worker": (WID, 90_000, b"info"),
    "beat_gateway": (GID, 90_000, 90_000, "0-0"),
    "reap": (90_000, 9, 9, 3, 9),
    "sweep": (9, 9, 90_000),
    "workers": (9,),
    "dead_letters": (9, "", ""),
    "retry": (LETTER, f"{SHARD}.{'r' * 26}", 90_000, 9, 9, 9),
    "purge": (LETTER,),
    "delete": (NAME, "acme"),
    "queue_shape": (9, 90_000),
    "running": (9, 9),
    "drain": (WID, "an operator", 90),
    "permitted": ("hget",),
}  # fmt: skip


def other_schema(monkeypatch: pytest.MonkeyPatch) -> dict[str, scripts.Script]:
    texts, libraries = scripts.sources()
    with monkeypatch.context() as patch:
        patch.setattr("common.keys.SCHEMA_VERSION", keys.SCHEMA_VERSION + 1)
        return {name: scripts.assemble(name, text, libraries) for name, text in texts.items()}


def everything(superuser: redis_sync.Redis) -> dict[bytes, bytes | None]:
    return {key: superuser.dump(key) for key in superuser.keys("*")}


async def make_dead_letter(ours: ScriptRunner, superuser: redis_sync.Redis) -> None:
    """A worker takes the one queued job and is gone, and no further attempt is granted."""
    await ours.run("claim", keys.meta(SHARD), WID, "an earlier call", *ASKED["claim"][2:])
    superuser.zadd(keys.worker_leases(SHARD), {WID: 0})
    assert await ours.run("reap", keys.meta(SHARD), 90_000, 9, 9, 1, 9) == [[], [LETTER.encode()]]
    assert superuser.zrange(keys.dead_letters(SHARD), 0, -1) == [LETTER.encode()]


@pytest.mark.parametrize("name", ASKED)
async def test_another_schema_version_is_refused_and_changes_nothing(
    name: str, gateway_redis: FlakyRedis, superuser: redis_sync.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = ScriptRunner(gateway_redis), ScriptRunner(gateway_redis, other_schema(monkeypatch))
    meta = keys.meta(SHARD)
    await ours.run("reap", meta, *ASKED["reap"])
    superuser.hset(meta, "grace", 0)
    for generation_id in (LETTER, NAME, f"{SHARD}.{'o' * 26}"):
        await ours.run("enqueue", meta, generation_id, *ASKED["enqueue"][1:])
        if generation_id == LETTER:
            await make_dead_letter(ours, superuser)
        elif generation_id == NAME:
            await ours.run("claim", meta, *ASKED["claim"])
    superuser.zadd(keys.deadlines(SHARD), {NAME: 1})
    if name in ("reap", "commit"):  # the one ends such a lease, the other renews it
        superuser.zadd(keys.worker_leases(SHARD), {WID: 0})
    before = everything(superuser)
    for runs in range(2):  # by SHA-1 too
        with pytest.raises(ResponseError, match=r"^SCHEMA stored 1, spoken 2"):
            await theirs.run(name, meta, *ASKED[name])
        assert everything(superuser) == before, runs
    await ours.run(name, meta, *ASKED[name])
    if name not in ("get", "owned", "wanted", "workers", "dead_letters", "queue_shape", "running", "permitted"):
        assert everything(superuser) != before, "the question would not have changed anything in any case"


def test_every_script_of_the_queue_is_asked() -> None:
    others = {name for name in scripts.NAMES if name.startswith("batch_")}  # they touch no shard
    assert set(scripts.NAMES) - set(ASKED) - others == {"publish", "unpublish", "quota_reserve", "quota_settle"}


async def test_the_refusal_names_both_versions(
    worker_redis: FlakyRedis, queue: JobQueue, superuser: redis_sync.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.enqueue(SHARD, make_job())
    before = everything(superuser)
    runner = ScriptRunner(worker_redis, other_schema(monkeypatch))
    claims = JobClaims(worker_redis, SHARD, keys.random_id(), QueueSettings(), retry=FAST_RETRY, scripts=runner)
    with pytest.raises(BackendRefused, match="another schema version") as refused:
        await claims.claim(1, ROOM, ROOM)
    assert refused.value.reason == "SCHEMA_MISMATCH"
    assert refused.value.metadata == {"error": "SCHEMA stored 1, spoken 2"}
    assert everything(superuser) == before


async def test_a_question_does_not_make_a_shard(queue: JobQueue, superuser: redis_sync.Redis) -> None:
    with pytest.raises(GenerationNotFound):
        await queue.get(keys.new_generation_id(SHARD), "acme")
    assert superuser.keys("*") == []

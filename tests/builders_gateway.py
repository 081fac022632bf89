"""Parts for tests of the gateway: logs with their chain, a queue that holds one generation, replies that get lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from common.chain import GENESIS, next_hash
from common.errors import GenerationNotFound, ResultLost, SequenceOutOfRange, Superseded
from common.generation import EventBody, FinishReason, OutputDelta, Usage
from common.job_queue import JobQueue
from common.jobs import Attachment, GenerationRecord, ItemKind, JobState, LogEvent, Reason, ReplyItem
from gateway.delivery import EventHub
from gateway.progress import LogPosition
from gateway.stream import EventStream, StreamFactory, StreamTimes
from torchrelay.v1 import generation_pb2 as pb

GENERATION_ID = "tiny.abcdefghijklmnopqrstuvwxyz"
TENANT = "acme"
GATEWAY_ID = "g1"
STREAM_TIMES = StreamTimes(reconcile_s=0.002, progress_s=1000, gather_s=0, start_s=0.002)
NUM_OUTPUTS = 2
_END_KINDS = {
    JobState.DONE: ItemKind.DONE,
    JobState.CANCELLED: ItemKind.CANCELLED,
    JobState.EXPIRED: ItemKind.EXPIRED,
    JobState.FAILED: ItemKind.FAILED,
}


def make_record(state: JobState = JobState.RUNNING, **fields: object) -> GenerationRecord:
    """A started generation of one output; further fields as in GenerationRecord."""
    record = GenerationRecord(
        generation_id=GENERATION_ID,
        state=state,
        reason=Reason.NONE,
        tenant=TENANT,
        key_id="k1",
        priority=1,
        epoch=1,
        attempts=0,
        num_claims=1,
        sequence=0,
        usage=Usage(3, 1, 5),
        place=0,
        worker_id="w1" if state is JobState.RUNNING else "",
        gateway_id="" if state.is_final else GATEWAY_ID,
        created_ms=1_000,
        started_ms=1_250,
        first_token_ms=1_300,
        ended_ms=2_000 if state.is_final else 0,
        deadline_ms=100_000,
        disconnect_grace_ms=0,
        echo=b"",
    )
    return replace(record, **fields)  # type: ignore[arg-type]


def chained(
    bodies: Sequence[tuple[int, EventBody]], last: ItemKind = ItemKind.EVENT, *, after: LogEvent | None = None
) -> list[LogEvent]:
    """A log of (epoch, body), the last of kind `last`; continues `after`."""
    digest, sequence = (after.chain_hash, after.sequence) if after is not None else (GENESIS, 0)
    log: list[LogEvent] = []
    for number, (epoch, body) in enumerate(bodies, start=1):
        digest = next_hash(digest, body.deltas)
        kind = last if number == len(bodies) else ItemKind.EVENT
        log.append(LogEvent(digest, epoch, sequence + number, body, kind))
    return log


def random_log(rng: random.Random, num_outputs: int, num_events: int, state: JobState) -> list[LogEvent]:
    """A whole log: tokens of several outputs, empty events, ends inside, takeovers, and a terminal event."""
    lengths = [0] * num_outputs
    ended: set[int] = set()
    epoch = 1
    bodies: list[tuple[int, EventBody]] = []
    for number in range(num_events):
        epoch += rng.random() < 0.15
        is_last = number == num_events - 1
        deltas = []
        for index in range(num_outputs):
            if index in ended or (rng.random() < 0.2 and not (is_last and state is JobState.DONE)):
                continue
            ids = tuple(rng.randrange(100) for _ in range(rng.randrange(3)))
            ends = (is_last and state is JobState.DONE) or rng.random() < 0.1
            if ends:
                ended.add(index)
            deltas.append(
                OutputDelta(
                    output_index=index,
                    first_token_index=lengths[index],
                    token_ids=ids,
                    text="".join(chr(97 + token_id % 26) for token_id in ids),
                    finish_reason=rng.choice((FinishReason.STOP, FinishReason.LENGTH)) if ends else None,
                )
            )
            lengths[index] += len(ids)
        bodies.append((epoch, EventBody(tuple(deltas))))
    return chained(bodies, _END_KINDS[state])


def item_of(event: LogEvent, *, with_body: bool = True) -> ReplyItem:
    """The copy of an event that a gateway hears; without its body if it was too large."""
    return ReplyItem(
        GENERATION_ID,
        event.chain_hash,
        event.epoch,
        event.sequence,
        event.body if with_body else None,
        event.kind,
        event.reason,
    )


def news(kind: ItemKind, event: LogEvent) -> ReplyItem:
    """News that were written right behind an event."""
    return ReplyItem(GENERATION_ID, event.chain_hash, event.epoch, event.sequence, None, kind)


@dataclass
class OneJobQueue:
    """A queue with one generation, whose log becomes visible event by event. Has the methods that streams call."""

    log: list[LogEvent]
    state: JobState
    num_visible: int = 0
    page: int = 3  # most events of one answer
    gateway_id: str = GATEWAY_ID  # of the gateway that asks
    holder: str = GATEWAY_ID  # where the generation is attached
    has_later_call: bool = False  # another call has attached since
    num_attached: int = 0
    num_reads: int = 0
    detached: list[tuple[str, str]] = field(default_factory=list)  # generation and attach ids

    def record(self) -> GenerationRecord:
        visible = self.log[: self.num_visible]
        is_over = bool(visible) and visible[-1].kind.is_terminal
        return make_record(
            self.state if is_over else JobState.RUNNING,
            sequence=len(visible),
            epoch=max((event.epoch for event in visible), default=1),
            gateway_id="" if is_over else self.holder,
        )

    async def get(self, generation_id: str, tenant: str) -> GenerationRecord:
        if (generation_id, tenant) != (GENERATION_ID, TENANT):
            raise GenerationNotFound
        return self.record()

    async def get_all(self, shard: str, generation_ids: Sequence[str]) -> list[GenerationRecord]:
        return [self.record() for generation_id in generation_ids if generation_id == GENERATION_ID]

    async def read_log(
        self, generation_id: str, tenant: str, after_sequence: int = 0, after_hash: bytes = b""
    ) -> Attachment:
        self.num_reads += 1
        record = await self.get(generation_id, tenant)
        if after_sequence > self.num_visible:
            if after_hash:
                raise ResultLost
            raise SequenceOutOfRange(after_sequence, self.num_visible)
        stored = self.log[after_sequence - 1].chain_hash if after_sequence else GENESIS
        if after_hash and stored != after_hash:
            raise ResultLost
        end = min(self.num_visible, after_sequence + self.page)
        return Attachment(record, tuple(self.log[after_sequence:end]), end < self.num_visible)

    async def attach(
        self,
        generation_id: str,
        tenant: str,
        after_sequence: int = 0,
        after_hash: bytes = b"",
        *,
        attach_id: str = "",
        again: bool = False,
    ) -> Attachment:
        if again and self.has_later_call:
            raise Superseded
        self.num_attached += 1
        self.holder = self.gateway_id
        return await self.read_log(generation_id, tenant, after_sequence, after_hash)

    async def detach(self, generation_id: str, *, attach_id: str = "", least_grace_ms: int = 0) -> JobState:
        self.detached.append((generation_id, attach_id))
        return self.record().state


def factory_for(
    queue: OneJobQueue, times: StreamTimes = STREAM_TIMES, max_pending: int = 4
) -> tuple[EventHub, StreamFactory]:
    """A hub and the streams of one generation's queue."""
    hub = EventHub(max_pending)
    return hub, StreamFactory(cast(JobQueue, queue), hub, times)


def open_stream(
    factory: StreamFactory,
    position: LogPosition | None = None,
    num_outputs: int = NUM_OUTPUTS,
    attachment: Attachment | None = None,
) -> EventStream:
    """A stream of the generation, for a call of its own."""
    accepted = pb.Accepted(generation_id=GENERATION_ID, config=pb.GenerationConfig(num_outputs=num_outputs))
    return factory.open(factory.listen(GENERATION_ID, TENANT), TENANT, accepted, position or LogPosition(), attachment)


def tokens(*ids: int, first: int = 0) -> tuple[int, EventBody]:
    """An epoch and an event of output 0."""
    return 1, EventBody((OutputDelta(0, first, ids, "".join(map(chr, ids))),))


async def collect(stream: EventStream) -> list[str | None]:
    """The kinds of events that a stream delivers."""
    return [event.WhichOneof("event") async for event in stream.events()]

"""One call's stream of events: from the reply stream while it can, from the log when it must."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from common import errors
from common.deltas import merge_deltas, merge_scores
from common.generation import EventBody, OutputDelta
from common.job_queue import JobQueue
from common.jobs import Attachment, GenerationRecord, ItemKind, LogEvent, ReplyItem
from common.sealing import PLAIN, Sealer
from common.tasks import TaskResult
from gateway import convert
from gateway.audit import call_began
from gateway.delivery import EventHub, Subscription
from gateway.looks import Looks
from gateway.progress import LogPosition, Verdict
from gateway.status import GenerationEndedError
from gateway.telemetry.streams import Opening, StreamMetrics, StreamWatch
from torchrelay.v1 import generation_pb2 as pb

_MAX_MESSAGES_PER_S: Final = 2500  # of one gateway process, all streams together: about a third of a core
_MAX_GATHER_S: Final = 0.1
_MIN_GATHER_S: Final = 0.004  # less is not worth a timer


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """Silences after which a stream does something by itself."""

    reconcile_s: float
    progress_s: float
    clock: Callable[[], float] = time.monotonic
    gather_s: float = 0.05  # so long the looks of silent streams wait for each other
    start_s: float = 0.25  # a start is told only if no token has followed until then, which says so too


class EventStream:
    """The events of one generation after a position, for one call."""

    def __init__(
        self,
        queue: JobQueue,
        subscription: Subscription,
        tenant: str,
        accepted: pb.Accepted,
        position: LogPosition,
        times: StreamTimes,
        looks: Looks,
        num_streams: Callable[[], int],
        watch: StreamWatch,
        attachment: Attachment | None = None,
    ) -> None:
        """`attachment` is what attaching returned, None for a generation that was queued just now."""
        self._queue = queue
        self._subscription = subscription
        self._generation_id = subscription.generation_id
        self._tenant = tenant
        self._accepted = accepted
        self._position = position
        self._resumed = position.sequence > 0
        self._times = times
        self._looks = looks
        self._num_streams = num_streams
        self._watch = watch
        self._state = pb.GENERATION_STATE_UNSPECIFIED
        self._place = -1
        self._has_untold_start = False
        self._must_read_log = False
        self._first_page = attachment
        self.ended = False
        self.result: TaskResult | None = None  # of a task, once it has come
        self.record: GenerationRecord | None = None  # once `events` has ended

    async def events(self) -> AsyncIterator[pb.GenerationEvent]:
        """Yield everything behind the position, ending with Finished.

        Raises Superseded, ResultLost, and GenerationEndedError for a generation that ended in an error. Between two
        events hardly more than the next one is kept: a caller may take as long as it likes to ask for it.
        """
        if self._first_page is not None:
            async for event in self._catch_up(self._take_first_page()):
                yield event
        last_sent, last_of_items = self._times.clock(), -math.inf
        while not self.ended:
            silence_s = self._times.start_s if self._has_untold_start else self._times.reconcile_s
            await self._subscription.wait(silence_s)
            await self._gather(last_of_items)
            items = self._subscription.take()
            if items is None:
                self._must_read_log = True
            events = self._apply(items) if items or self._must_read_log else await self._after_silence()
            del items  # not kept while a slow caller reads what was made of them
            for event in events:
                last_sent = last_of_items = self._times.clock()
                yield event
            if self._must_read_log:
                async for event in self._catch_up(await self._read_log()):
                    last_sent = self._times.clock()
                    yield event
            if not self.ended and self._times.clock() - last_sent >= self._times.progress_s:
                last_sent = self._times.clock()
                yield convert.progress_event(await self._queue.get(self._generation_id, self._tenant), self._position)
        yield await self._finish()

    async def _after_silence(self) -> list[pb.GenerationEvent]:
        """Tell a start, or look whether anything was missed: then the log is read. Else only the place may be new.

        The same number of events in the same epoch are the same events; should the server have lost and replaced some,
        the next one's chain hash tells.
        """
        if self._has_untold_start:
            return self._changed_to(pb.GENERATION_STATE_RUNNING)
        record, position = await self._looks.record(self._generation_id), self._position
        is_as_known = (
            record is not None
            and not record.state.is_final
            and record.gateway_id == self._queue.gateway_id  # else this gateway's lease had ended, or another has it
            and (record.epoch, record.sequence) == (position.epoch, position.sequence)
        )
        if record is None or not is_as_known:
            self._must_read_log = True
            return []
        return self._state_change(record)

    async def _gather(self, last_sent: float) -> None:
        """Let tokens gather while many streams share this process: a message costs as much as several tokens in it."""
        pause = min(_MAX_GATHER_S, self._num_streams() / _MAX_MESSAGES_PER_S) - (self._times.clock() - last_sent)
        if pause > _MIN_GATHER_S:
            await asyncio.sleep(pause)

    def _apply(self, items: tuple[ReplyItem, ...] | None) -> list[pb.GenerationEvent]:
        """Turn waiting items into as few events as can be, as far as they continue the position.

        What waits is sent as one message: a caller that reads slower than the model writes gets fewer, longer ones.
        """
        bodies: list[EventBody] = []
        before = self._position.copy()
        produced: list[pb.GenerationEvent] = []
        for item in items or ():
            verdict = self._position.judge(item)
            if verdict is Verdict.READ_LOG:
                self._must_read_log = True
                break
            if verdict is Verdict.NEWS:
                # Tokens first: news bear the position, and who resumes there must have seen everything up to it.
                produced += self._reported(bodies, before)
                bodies, before = [], self._position.copy()
                produced += self._news(item.kind)
            elif verdict is Verdict.DELIVER:
                bodies.append(self._position.advance(item))
                self._note_terminal(item.kind)
        return [*produced, *self._reported(bodies, before)]

    def _take_first_page(self) -> Attachment:
        page, self._first_page = self._first_page, None
        assert page is not None
        return page

    async def _catch_up(self, page: Attachment) -> AsyncIterator[pb.GenerationEvent]:
        """Yield what the log holds behind the position, a page at a time.

        Raises ResultLost for a page that says that the log goes on and brings nothing of it: the same would be asked
        again for ever.
        """
        self._must_read_log = False
        while True:
            before, record, more = self._position.sequence, page.record, page.more
            events = self._read_page(page)
            if more and self._position.sequence == before:
                raise errors.ResultLost
            del page  # not kept while a slow caller reads what was made of it
            for event in events:
                yield event
            if not more:
                break
            page = await self._read_log()
        self._position.epoch = record.epoch
        if record.state.is_final:
            self.ended = True
        else:
            for event in self._state_change(record):
                yield event

    def _read_page(self, page: Attachment) -> list[pb.GenerationEvent]:
        before = self._position.copy()
        bodies = [self._advance(entry) for entry in page.events if entry.sequence > self._position.sequence]
        return self._reported(bodies, before)

    def _advance(self, entry: LogEvent) -> EventBody:
        body = self._position.advance(entry)
        self._note_terminal(entry.kind)
        return body

    def _note_terminal(self, kind: ItemKind) -> None:
        self.ended = self.ended or kind.is_terminal

    def _reported(self, bodies: list[EventBody], before: LogPosition) -> list[pb.GenerationEvent]:
        """Return what these bodies report, the first of which stands behind `before` and the last at the position."""
        for body in bodies:
            self.result = body.result or self.result
        tokens = self._tokens([delta for body in bodies for delta in body.deltas])
        scores = merge_scores(body.prompt_scores for body in bodies)
        if scores is None:
            return tokens
        # Who resumes between the two has seen neither: else these tokens would be lost to it.
        return [convert.scores_event(scores, before if tokens else self._position), *tokens]

    def _tokens(self, deltas: list[OutputDelta]) -> list[pb.GenerationEvent]:
        event = convert.deltas_event(merge_deltas(deltas), self._position, self._generation_id)
        if event is None:
            return []
        self._watch.passed(sum(len(delta.token_ids) for delta in deltas))
        self._state = pb.GENERATION_STATE_RUNNING  # tokens say so: no Progress is needed
        self._has_untold_start = False
        return [event]

    def _news(self, kind: ItemKind) -> list[pb.GenerationEvent]:
        if kind is ItemKind.STARTED:
            self._has_untold_start = self._state != pb.GENERATION_STATE_RUNNING
            return []
        return self._changed_to(pb.GENERATION_STATE_RECOVERING)

    def _changed_to(self, state: pb.GenerationState.ValueType) -> list[pb.GenerationEvent]:
        self._has_untold_start = False
        if state == self._state:
            return []
        self._state = state
        position = self._position
        return [
            pb.GenerationEvent(
                sequence=position.sequence,
                chain_hash=convert.chain_hash(position),
                progress=pb.Progress(state=state),
            )
        ]

    def _state_change(self, record: GenerationRecord) -> list[pb.GenerationEvent]:
        """Return a Progress if the state or the place in line is another than last time."""
        self._has_untold_start = False
        state, place = convert.state_of(record), record.place
        if state == self._state and (place == self._place or state == pb.GENERATION_STATE_RUNNING):
            return []
        self._state, self._place = state, place
        return [convert.progress_event(record, self._position)]

    async def _finish(self) -> pb.GenerationEvent:
        """Return the last event. Raises GenerationEndedError."""
        record = self.record = await self._queue.get(self._generation_id, self._tenant)
        if not record.state.is_final:
            raise errors.ResultLost  # the end was delivered, and then lost by the server
        failure = convert.failure_of(record)
        if failure is not None:
            raise GenerationEndedError(failure, convert.usage_message(record.usage) if record.started else None)
        num_outputs = self._accepted.config.num_outputs or 1
        if self._resumed and len(self._position.ends) < num_outputs:
            await self._read_earlier_ends()
        return convert.finished_event(record, self._position, num_outputs)

    async def _read_earlier_ends(self) -> None:
        """Learn how outputs ended before the event that this call resumed after."""
        sequence, more = 0, True
        while more:
            part = await self._queue.read_log(self._generation_id, self._tenant, sequence)
            for entry in part.events:
                sequence = entry.sequence
                if isinstance(entry.body, EventBody):
                    self._position.note_ends(entry.body.deltas)
            more = part.more and bool(part.events)

    async def _read_log(self) -> Attachment:
        """Read on behind the position, and see to it that the generation is still ours. Raises Superseded, ResultLost.

        Nobody's: this gateway's lease had ended. Without attaching again the disconnect grace would go on.
        """
        position = self._position
        where = (self._generation_id, self._tenant, position.sequence, position.chain_hash or b"")
        try:
            found = await self._queue.read_log(*where)
            holder = found.record.gateway_id
            if found.record.state.is_final or holder == self._queue.gateway_id:
                return found
            if holder:
                raise errors.Superseded
            # Only if it was ours: it may be a later call's whose gateway's lease has ended, and that goes on.
            return await self._queue.attach(*where, attach_id=self._subscription.attach_id, again=True)
        except errors.Superseded:
            self._subscription.supersede()
            raise
        except errors.SequenceOutOfRange as error:
            raise errors.ResultLost from error


class StreamFactory:
    """Opens streams, and lets go of generations whose calls are over."""

    def __init__(
        self,
        queue: JobQueue,
        hub: EventHub,
        times: StreamTimes,
        sealer: Sealer = PLAIN,
        metrics: StreamMetrics | None = None,
    ) -> None:
        self._metrics = metrics or StreamMetrics()
        self._queue = queue
        self._hub = hub
        self._times = times
        self._looks = Looks(queue, times.gather_s)
        self._sealer = sealer
        self._abandoned: set[tuple[str, str, int]] = set()  # generation and attach ids, least grace

    def listen(self, generation_id: str, tenant: str, *, in_background: bool = False) -> Subscription:
        """Subscribe before attaching or enqueuing, so that no event falls between the two.

        Whether it is that tenant's is not known yet: another's sealed events do not open, and plain ones are delivered
        to nobody before the generation is attached.
        """
        return self._hub.subscribe(generation_id, self._sealer.of(tenant, generation_id), in_background=in_background)

    def let_go(self, subscription: Subscription) -> None:
        """End a subscription to a generation that needs nobody to listen."""
        self._hub.unsubscribe(subscription)

    def open(
        self,
        subscription: Subscription,
        tenant: str,
        accepted: pb.Accepted,
        position: LogPosition,
        attachment: Attachment | None = None,
    ) -> EventStream:
        """Stream a generation that is attached to this gateway; calls that had it before end with Superseded.

        `attachment` is what attaching returned, None for a generation that was queued just now.
        """
        self._hub.take_over(subscription)
        kind = Opening.NEW if attachment is None else Opening.RESUMED if position.sequence else Opening.REPEATED
        watch = self._metrics.watch(accepted.model, kind, None if subscription.in_background else call_began())
        return EventStream(
            self._queue,
            subscription,
            tenant,
            accepted,
            position,
            self._times,
            self._looks,
            self._hub.__len__,
            watch,
            attachment,
        )

    async def close(self, subscription: Subscription, *, ended: bool, least_grace_ms: int = 0) -> None:
        """End a subscription. If the generation goes on and nobody else listens to it, its disconnect grace begins.

        `least_grace_ms` holds where that is shorter. Shielded: the call that owned it has usually just been cancelled.
        """
        self._hub.unsubscribe(subscription)
        if not ended and not subscription.superseded:
            attached = (subscription.generation_id, subscription.attach_id, least_grace_ms)
            self._abandoned.add(attached)
            await asyncio.shield(self._detach(attached))

    async def detach_abandoned(self) -> None:
        """Begin the grace of every generation that nobody listens to any more, as far as the server answers."""
        for attached in list(self._abandoned):
            await self._detach(attached)

    async def _detach(self, attached: tuple[str, str, int]) -> None:
        generation_id, attach_id, least_grace_ms = attached
        if self._hub.has(generation_id):
            return  # by a call that may yet be refused it
        try:
            await self._queue.detach(generation_id, attach_id=attach_id, least_grace_ms=least_grace_ms)
        except errors.Unavailable:
            return  # the server is away; the gateway's upkeep tries again
        self._abandoned.discard(attached)


def stored_body(accepted: pb.Accepted) -> bytes:
    """What the queue keeps for the gateways: how the generation was accepted."""
    return accepted.SerializeToString(deterministic=True)


def accepted_of(record: GenerationRecord) -> pb.Accepted:
    """Return how a stored generation was accepted, with its place now."""
    accepted = pb.Accepted.FromString(record.echo)
    accepted.generation_id = record.generation_id
    accepted.place = max(0, record.place - 1)
    convert.set_wait(accepted, record.expected_wait_ms)
    return accepted

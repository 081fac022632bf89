"""Whatever the reply stream loses, repeats or mixes up, a call hears its log exactly once, in order, to the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.chain import GENESIS
from common.errors import BackendUnavailable, ResultLost, Superseded, WorkerFailed
from common.generation import EventBody, FinishReason
from common.jobs import Attachment, ItemKind, JobState, LogEvent, ReplyItem
from gateway.delivery import EventHub
from gateway.progress import LogPosition, Verdict
from gateway.status import GenerationEndedError
from gateway.stream import StreamTimes
from tests.builders_gateway import (
    GENERATION_ID,
    NUM_OUTPUTS,
    TENANT,
    OneJobQueue,
    chained,
    collect,
    factory_for,
    item_of,
    news,
    open_stream,
    random_log,
    tokens,
)
from torchrelay.v1 import generation_pb2 as pb


async def deliver(hub: EventHub, queue: OneJobQueue, rng: random.Random) -> None:
    """Write the whole log, and give the gateway a bad copy of it: gaps, repetitions, mixed-up batches, old news."""
    while queue.num_visible < len(queue.log):
        queue.num_visible = min(len(queue.log), queue.num_visible + rng.randrange(1, 5))
        if rng.random() < 0.2:
            queue.holder = ""  # this gateway's lease had ended for a moment
        batch = [
            item_of(event, with_body=rng.random() > 0.1)
            for event in queue.log[max(0, queue.num_visible - 6) : queue.num_visible]
            for _ in range(rng.choice((0, 1, 1, 1, 2)))
        ]
        kinds = (ItemKind.STARTED, ItemKind.REQUEUED, ItemKind.SUPERSEDED)
        for _ in range(rng.choice((0, 0, 1, 2))):
            at = rng.randrange(len(batch) + 1)
            batch.insert(at, news(rng.choice(kinds), queue.log[rng.randrange(queue.num_visible)]))
        if rng.random() < 0.3:
            rng.shuffle(batch)
        hub.dispatch(batch)
        for _ in range(rng.choice((0, 1, 3))):
            await asyncio.sleep(0)


def check_prefix(events: Sequence[pb.GenerationEvent], log: Sequence[LogEvent], after: int) -> None:
    """Hold delivered events to the law at every point where the call could have broken.

    Whoever has read up to any event holds exactly the tokens of the log behind `after` up to its sequence.
    """
    received: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    for event in events:
        for delta in event.deltas.deltas:
            received.setdefault(delta.output_index, []).extend(delta.token_ids)
            texts[delta.output_index] = texts.get(delta.output_index, "") + delta.text
        expected: dict[int, list[int]] = {}
        expected_texts: dict[int, str] = {}
        for entry in log[after : event.sequence]:
            assert entry.body is not None
            for part in entry.body.deltas:
                if part.token_ids:
                    expected.setdefault(part.output_index, []).extend(part.token_ids)
                    expected_texts[part.output_index] = expected_texts.get(part.output_index, "") + part.text
        assert received == expected
        assert texts == expected_texts
        digest = log[event.sequence - 1].chain_hash if event.sequence else b""
        assert event.chain_hash == digest or (event.sequence == after and event.chain_hash == b"")


def expected_ends(log: Sequence[LogEvent], state: JobState) -> list[int]:
    otherwise = FinishReason.CANCELLED if state is JobState.CANCELLED else FinishReason.TIME_LIMIT
    reasons = [otherwise] * NUM_OUTPUTS
    for entry in log:
        assert entry.body is not None
        for delta in entry.body.deltas:
            if delta.finish_reason is not None:
                reasons[delta.output_index] = delta.finish_reason
    return [pb.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in reasons]


async def run_scenario(rng: random.Random, position_class: type[LogPosition] = LogPosition) -> None:
    state = rng.choice((JobState.DONE, JobState.CANCELLED, JobState.EXPIRED))
    log = random_log(rng, NUM_OUTPUTS, rng.randrange(1, 20), state)
    queue = OneJobQueue(log, state, page=rng.randrange(1, 5))
    hub, factory = factory_for(queue, max_pending=rng.choice((2, 64, 64)))
    after = rng.choice((0, 0, rng.randrange(len(log))))
    position = position_class()
    if after:
        position = position_class(after, log[after - 1].chain_hash if rng.random() < 0.5 else None)
        queue.num_visible = rng.randrange(after, len(log))
    attachment = None
    if after:
        attachment = await queue.attach(GENERATION_ID, TENANT, after, position.chain_hash or b"")
    stream = open_stream(factory, position, attachment=attachment)
    events: list[pb.GenerationEvent] = []

    async def read() -> None:
        async for event in stream.events():
            events.append(event)
            if rng.random() < 0.2:
                await asyncio.sleep(0)

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(read())
        await deliver(hub, queue, rng)
    check_prefix(events, log, after)
    assert [event.WhichOneof("event") for event in events].index("finished") == len(events) - 1
    assert events[-1].sequence == len(log)
    assert [end.finish_reason for end in events[-1].finished.outputs] == expected_ends(log, state)


@given(st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_every_event_is_delivered_once_and_in_order(rng: random.Random) -> None:
    asyncio.run(run_scenario(rng))


class WithoutGapCheck(LogPosition):
    """Takes whatever is ahead."""

    def judge(self, item: ReplyItem) -> Verdict:
        verdict = super().judge(item)
        return Verdict.DELIVER if verdict is Verdict.READ_LOG and item.body is not None else verdict

    def advance(self, item: LogEvent | ReplyItem) -> EventBody:
        self.sequence = item.sequence - 1
        self.chain_hash = None
        return super().advance(item)


class WithoutRepeatCheck(LogPosition):
    """Takes an event again."""

    def judge(self, item: ReplyItem) -> Verdict:
        verdict = super().judge(item)
        is_copy = item.kind not in (ItemKind.STARTED, ItemKind.REQUEUED) and item.body is not None
        return Verdict.DELIVER if verdict is Verdict.DROP and is_copy else verdict

    def advance(self, item: LogEvent | ReplyItem) -> EventBody:
        self.sequence = item.sequence - 1
        self.chain_hash = None
        return super().advance(item)


class WithoutStale(LogPosition):
    """Never asks for the log."""

    def judge(self, item: ReplyItem) -> Verdict:
        verdict = super().judge(item)
        return Verdict.DROP if verdict is Verdict.READ_LOG else verdict

    def note_ends(self, deltas: Any) -> None:
        """And forgets how outputs ended."""


@pytest.mark.parametrize("mutant", [WithoutGapCheck, WithoutRepeatCheck, WithoutStale])
def test_without_its_checks_a_position_fails_that_law(mutant: type[LogPosition]) -> None:
    failures = 0
    for seed in range(30):
        try:
            asyncio.run(run_scenario(random.Random(seed), mutant))
        except (AssertionError, ExceptionGroup):
            failures += 1
    assert failures >= 3


def fork(rng: random.Random) -> tuple[OneJobQueue, list[LogEvent], int]:
    """A queue whose server lost the log's tail and wrote another; the old log, and how much of it both share."""
    bodies = [tokens(*(rng.randrange(100) for _ in range(rng.choice((1, 2)))), first=2 * n) for n in range(12)]
    old = chained(bodies, ItemKind.DONE)
    shared = rng.randrange(0, 6)
    tail = chained([tokens(777, 888)] * (12 - shared), ItemKind.DONE, after=old[shared - 1] if shared else None)
    return OneJobQueue([*old[:shared], *tail], JobState.DONE), old, shared


async def run_fork(rng: random.Random, position_class: type[LogPosition] = LogPosition) -> None:
    queue, old, shared = fork(rng)
    hub, factory = factory_for(queue)
    stream = open_stream(factory, position_class(), num_outputs=1)
    told = rng.randrange(shared + 1, 9)
    hub.dispatch(item_of(event) for event in old[:told][-4:])  # no more than a call may leave waiting
    queue.num_visible = told
    kept, queue.log = queue.log, old
    events: list[pb.GenerationEvent] = []
    async with asyncio.timeout(5), aclosing(cast("AsyncIterator[Any]", stream.events())) as reading:
        try:
            async for event in reading:
                events.append(event)
                if event.sequence == told:  # everything that was written has been read; now the server forgets
                    queue.log = kept
                    queue.num_visible = rng.choice((min(shared, told), len(kept)))
                    if rng.random() < 0.5:
                        hub.dispatch(item_of(event) for event in kept[told:][:3])
        except ResultLost:
            check_prefix(events, old, 0)
            return
    raise AssertionError("the other log was delivered as if it were the first one's end")


@given(st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_another_log_under_the_same_numbers_is_never_continued(rng: random.Random) -> None:
    asyncio.run(run_fork(rng))


class WithoutChain(LogPosition):
    """Believes every event that has the next number."""

    def advance(self, item: LogEvent | ReplyItem) -> EventBody:
        self.chain_hash = None
        body = super().advance(item)
        self.chain_hash = None
        return body


def test_without_the_chain_another_log_would_be_continued() -> None:
    failures = 0
    for seed in range(30):
        try:
            asyncio.run(run_fork(random.Random(seed), WithoutChain))
        except AssertionError:
            failures += 1
    assert failures >= 3


async def test_a_generation_that_has_ended_is_replayed_to_its_end() -> None:
    queue = OneJobQueue(chained([tokens(65), tokens(66, first=1)], ItemKind.DONE), JobState.DONE, num_visible=2, page=1)
    _, factory = factory_for(queue, StreamTimes(60, 60))
    for after, kinds in ((0, ["deltas", "deltas", "finished"]), (2, ["finished"])):
        position = LogPosition(after, queue.log[after - 1].chain_hash if after else GENESIS)
        attachment = await queue.attach(GENERATION_ID, TENANT, after)
        stream = open_stream(factory, position, attachment=attachment)
        assert await collect(stream) == kinds
        assert stream.ended


async def test_news_do_not_overtake_the_tokens_before_them() -> None:
    queue = OneJobQueue(chained([tokens(65), tokens(66, first=1)]), JobState.DONE, num_visible=2)
    hub, factory = factory_for(queue, StreamTimes(60, 60))
    stream = open_stream(factory)
    hub.dispatch([item_of(queue.log[0]), item_of(queue.log[1]), news(ItemKind.REQUEUED, queue.log[1])])
    async with aclosing(cast("AsyncIterator[Any]", stream.events())) as events:
        first, second = await anext(events), await anext(events)
    assert [delta.text for delta in first.deltas.deltas] == ["AB"]
    assert (second.sequence, second.progress.state) == (2, pb.GENERATION_STATE_RECOVERING)


async def test_a_slow_caller_gets_fewer_and_longer_messages() -> None:
    queue = OneJobQueue(chained([tokens(65), tokens(66, first=1), tokens(67, first=2)]), JobState.DONE, num_visible=3)
    hub, factory = factory_for(queue, StreamTimes(60, 60))
    hub_stream = open_stream(factory)
    hub.dispatch(map(item_of, queue.log))
    async with aclosing(cast("AsyncIterator[Any]", hub_stream.events())) as events:
        event = await anext(events)
    (delta,) = event.deltas.deltas
    assert (event.sequence, delta.text, delta.first_token_index, list(delta.token_ids)) == (3, "ABC", 0, [65, 66, 67])


async def test_items_of_an_earlier_epoch_ahead_of_the_position_make_it_read_the_log() -> None:
    """A server that lost a takeover goes on at an earlier epoch: such items come again and again, without a silence."""
    log = chained([(3, tokens(65)[1]), (2, tokens(66, first=1)[1])])
    queue = OneJobQueue(log, JobState.DONE, num_visible=1)
    hub, factory = factory_for(queue, StreamTimes(60, 60))
    stream = open_stream(factory)
    async with asyncio.timeout(5), aclosing(cast("AsyncIterator[Any]", stream.events())) as events:
        hub.dispatch([item_of(log[0])])
        assert (await anext(events)).sequence == 1
        queue.num_visible = 2
        hub.dispatch([item_of(log[1])])
        assert (await anext(events)).sequence == 2


async def test_old_news_of_another_gateway_do_not_end_a_stream() -> None:
    queue = OneJobQueue(chained([tokens(65)], ItemKind.DONE), JobState.DONE)
    hub, factory = factory_for(queue)
    stream = open_stream(factory, num_outputs=1)
    hub.dispatch([news(ItemKind.SUPERSEDED, queue.log[0])])
    queue.num_visible = 1
    async with asyncio.timeout(5):
        assert [event.WhichOneof("event") async for event in stream.events()] == ["deltas", "finished"]


async def test_a_stream_that_another_gateway_took_over_ends() -> None:
    queue = OneJobQueue(chained([tokens(65)], ItemKind.DONE), JobState.DONE, holder="g2")
    hub, factory = factory_for(queue, StreamTimes(60, 60))
    subscription = factory.listen(GENERATION_ID, TENANT)
    stream = factory.open(subscription, TENANT, pb.Accepted(generation_id=GENERATION_ID), LogPosition())
    hub.dispatch([news(ItemKind.SUPERSEDED, queue.log[0])])
    with pytest.raises(Superseded):
        await collect(stream)
    await factory.close(subscription, ended=stream.ended)
    assert queue.detached == []
    assert len(hub) == 0


async def test_a_stream_whose_gateway_had_lost_its_lease_is_attached_again() -> None:
    queue = OneJobQueue(chained([tokens(65)], ItemKind.DONE), JobState.DONE, holder="")
    _, factory = factory_for(queue)
    stream = open_stream(factory, num_outputs=1)
    async with asyncio.timeout(5), aclosing(cast("AsyncIterator[Any]", stream.events())) as events:
        assert (await anext(events)).WhichOneof("event") == "progress"  # read from the log, in a silence
        assert (queue.num_attached, queue.holder) == (1, queue.gateway_id)
        queue.num_visible = 1
        assert [event.WhichOneof("event") async for event in events] == ["deltas", "finished"]


async def test_a_stream_that_a_later_call_had_when_the_lease_ended_is_not_taken_back() -> None:
    queue = OneJobQueue(chained([tokens(65)], ItemKind.DONE), JobState.RUNNING, holder="")
    queue.has_later_call = True
    _, factory = factory_for(queue)
    subscription = factory.listen(GENERATION_ID, TENANT)
    stream = factory.open(subscription, TENANT, pb.Accepted(generation_id=GENERATION_ID), LogPosition())
    with pytest.raises(Superseded):
        await asyncio.wait_for(collect(stream), 5)
    await factory.close(subscription, ended=stream.ended)
    assert (queue.num_attached, queue.holder, queue.detached) == (0, "", [])


class GapQueue(OneJobQueue):
    """Its server counts more events than its log has."""

    async def read_log(self, *args: Any, **options: Any) -> Attachment:
        page = await super().read_log(*args, **options)
        assert self.num_reads < 10, "asked again and again"
        return replace(page, more=True)


@pytest.mark.parametrize("is_attached", [True, False])
@pytest.mark.parametrize("num_visible", [0, 1])
async def test_a_log_that_goes_on_with_nothing_is_lost(num_visible: int, is_attached: bool) -> None:
    queue = GapQueue(chained([tokens(65), tokens(66, first=1)]), JobState.DONE, num_visible=num_visible)
    _, factory = factory_for(queue)
    first_page = await queue.attach(GENERATION_ID, TENANT) if is_attached else None
    with pytest.raises(ResultLost):
        await collect(open_stream(factory, num_outputs=1, attachment=first_page))
    assert queue.num_reads == 1 + num_visible  # the page with what there is, and the one with nothing


async def test_a_failed_generation_ends_its_stream_with_its_error_and_usage() -> None:
    queue = OneJobQueue(chained([tokens(65)], ItemKind.FAILED), JobState.FAILED, num_visible=1)
    _, factory = factory_for(queue)
    stream = open_stream(factory, num_outputs=1)
    with pytest.raises(GenerationEndedError) as raised:
        await collect(stream)
    assert isinstance(raised.value.error, WorkerFailed)
    assert raised.value.usage == pb.Usage(prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=5)


async def test_an_end_that_the_server_lost_again_is_not_reported_as_an_end() -> None:
    log = chained([tokens(65)], ItemKind.DONE)
    queue = OneJobQueue(log, JobState.DONE)
    hub, factory = factory_for(queue)
    stream = open_stream(factory, num_outputs=1)
    hub.dispatch(map(item_of, log))  # delivered, but not visible: the server failed over
    with pytest.raises(ResultLost):
        await collect(stream)


async def test_a_call_that_leaves_lets_go_of_its_generation() -> None:
    queue = OneJobQueue(chained([tokens(65)]), JobState.DONE)
    _, factory = factory_for(queue)
    call = factory.listen(GENERATION_ID, TENANT)
    await factory.close(call, ended=False)
    assert queue.detached == [(GENERATION_ID, call.attach_id)]


async def test_a_least_grace_holds_although_the_server_was_away_at_first() -> None:
    """Or the caller that was told to repeat its call would find a cancelled generation."""
    graces: list[int] = []

    class Away(OneJobQueue):
        async def detach(self, generation_id: str, *, attach_id: str = "", least_grace_ms: int = 0) -> JobState:
            graces.append(least_grace_ms)
            if len(graces) == 1:
                raise BackendUnavailable("away")
            return await super().detach(generation_id, attach_id=attach_id)

    queue = Away(chained([tokens(65)]), JobState.DONE)
    _, factory = factory_for(queue)
    await factory.close(factory.listen(GENERATION_ID, TENANT), ended=False, least_grace_ms=30_000)
    await factory.detach_abandoned()
    await factory.detach_abandoned()
    assert graces == [30_000, 30_000]


async def test_a_call_that_ended_leaves_nothing_behind() -> None:
    queue = OneJobQueue(chained([tokens(65)]), JobState.DONE)
    hub, factory = factory_for(queue)
    await factory.close(factory.listen(GENERATION_ID, TENANT), ended=True)
    await factory.detach_abandoned()
    assert queue.detached == []
    assert len(hub) == 0


async def test_a_refused_call_takes_nothing_from_the_one_that_has_the_stream() -> None:
    """Anybody may ask for any id: only an attach that succeeded supersedes."""
    queue = OneJobQueue(chained([tokens(65)], ItemKind.DONE), JobState.DONE)
    hub, factory = factory_for(queue, StreamTimes(60, 60))
    stream = open_stream(factory, num_outputs=1)
    intruder = factory.listen(GENERATION_ID, TENANT)
    await factory.close(intruder, ended=True)
    queue.num_visible = 1
    hub.dispatch(map(item_of, queue.log))
    assert [event.WhichOneof("event") async for event in stream.events()] == ["deltas", "finished"]


async def test_a_generation_is_let_go_of_once_the_call_that_could_have_taken_it_is_refused() -> None:
    queue = OneJobQueue(chained([tokens(65)]), JobState.DONE)
    _, factory = factory_for(queue)
    first, second = factory.listen(GENERATION_ID, TENANT), factory.listen(GENERATION_ID, TENANT)
    await factory.close(first, ended=False)
    assert queue.detached == []
    await factory.close(second, ended=True)
    await factory.detach_abandoned()
    assert queue.detached == [(GENERATION_ID, first.attach_id)]


async def test_the_latest_call_wins() -> None:
    queue = OneJobQueue(chained([tokens(65)]), JobState.DONE)
    hub, factory = factory_for(queue, StreamTimes(60, 60))
    first = factory.listen(GENERATION_ID, TENANT)
    accepted = pb.Accepted(generation_id=GENERATION_ID)
    stream = factory.open(first, TENANT, accepted, LogPosition())
    factory.open(factory.listen(GENERATION_ID, TENANT), TENANT, accepted, LogPosition())
    with pytest.raises(Superseded):
        await collect(stream)
    await factory.close(first, ended=False)
    await factory.detach_abandoned()
    assert queue.detached == []
    assert hub.has(GENERATION_ID)

"""From the reply streams to the calls that wait: who listens to which generation in this process.

The reply stream is only the fast way to hear of an event; the log is the truth. So everything here may be lost: a
subscription that missed something, or holds too much, is told to read the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from sys import getsizeof
from typing import Final

from common import keys
from common.errors import SealBroken, Superseded
from common.generation import Alternatives, EventBody
from common.jobs import ItemKind, ReplyItem
from common.records import open_item
from common.sealing import PLAIN, GenerationSealer
from common.tasks import bytes_of_result

_PART_BYTES: Final = 200  # of an event or delta, besides what it holds
_TOKEN_ID_BYTES: Final = 40
_LOGPROB_BYTES: Final = 32
_ALTERNATIVE_BYTES: Final = 56 + _TOKEN_ID_BYTES + _LOGPROB_BYTES


class Subscription:
    """What one call has not yet taken of its generation's items. Used from one event loop.

    `attach_id` names the call to the queue, so that letting go of it later cannot end another call's stream.
    """

    __slots__ = (
        "_max_pending",
        "_max_pending_bytes",
        "_must_read_log",
        "_num_pending_bytes",
        "_opener",
        "_pending",
        "_waiter",
        "attach_id",
        "generation_id",
        "in_background",
        "superseded",
    )

    def __init__(
        self,
        generation_id: str,
        max_pending: int,
        max_pending_bytes: int,
        opener: GenerationSealer | None = None,
        *,
        in_background: bool = False,
    ) -> None:
        """`opener` opens sealed items of the generation. In the background there is no stream to share time with."""
        self._opener = opener or PLAIN.of("", generation_id)
        self.generation_id = generation_id
        self.attach_id = keys.random_id()
        self.superseded = False
        self.in_background = in_background
        self._max_pending = max_pending
        self._max_pending_bytes = max_pending_bytes
        self._pending: list[ReplyItem] = []
        self._num_pending_bytes = 0
        self._must_read_log = False
        self._waiter: asyncio.Future[None] | None = None

    def offer(self, item: ReplyItem) -> None:
        """Take an item; a slow call's items are dropped, since it can read them in the log when it has time.

        That another gateway has attached may be old news, from before this subscription: what is stored decides.
        """
        if not self._must_read_log:  # else what it reads there will hold this one too
            try:
                item = open_item(item, self._opener)
            except SealBroken:  # whoever reads the log is told, or that it is not theirs
                self._clear()
                self._must_read_log = True
                self._wake()
                return
            self._pending.append(item)
            self._num_pending_bytes += _bytes_of(item)
            if (
                item.kind is ItemKind.SUPERSEDED
                or len(self._pending) > self._max_pending
                or self._num_pending_bytes > self._max_pending_bytes
            ):
                self._clear()
                self._must_read_log = True
        self._wake()

    def supersede(self) -> None:
        """End this subscription: another call took its place."""
        self.superseded = True
        self._wake()

    def look(self) -> None:
        """Have the log read next."""
        self._must_read_log = True
        self._wake()

    async def wait(self, timeout_s: float) -> None:
        """Wait until `take` would return more than nothing, or raise; at most so long."""
        if not (self._pending or self._must_read_log or self.superseded):
            # A bare future and timer: asyncio's event and timeout would be a fifth of what a token costs a gateway.
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None

    def take(self) -> tuple[ReplyItem, ...] | None:
        """Return everything that waits; None when the log must be read.

        Raises Superseded once another stream of this generation was attached.
        """
        if self.superseded:
            raise Superseded
        items = tuple(self._pending)
        self._clear()
        if self._must_read_log:
            self._must_read_log = False
            return None
        return items

    def _clear(self) -> None:
        self._pending.clear()
        self._num_pending_bytes = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EventHub:
    """The subscriptions of this process, by generation."""

    def __init__(self, max_pending: int, max_pending_bytes: int = 256 << 10) -> None:
        """Of each subscription, at most so many items wait, in about so many bytes."""
        self._max_pending = max_pending
        self._max_pending_bytes = max_pending_bytes
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._num_subscriptions = 0  # asked for with every message

    def __len__(self) -> int:
        return self._num_subscriptions

    def has(self, generation_id: str) -> bool:
        """Whether a call listens to this generation here."""
        return generation_id in self._subscriptions

    def subscribe(
        self, generation_id: str, opener: GenerationSealer | None = None, *, in_background: bool = False
    ) -> Subscription:
        """Listen to a generation, beside those who do already: whether this call may have it is not known yet."""
        subscription = Subscription(
            generation_id, self._max_pending, self._max_pending_bytes, opener, in_background=in_background
        )
        self._subscriptions.setdefault(generation_id, []).append(subscription)
        self._num_subscriptions += not in_background
        return subscription

    def take_over(self, subscription: Subscription) -> None:
        """The latest call wins: all other subscriptions of its generation end with Superseded."""
        for other in self._subscriptions.get(subscription.generation_id, ()):
            if other is not subscription:
                other.supersede()

    def unsubscribe(self, subscription: Subscription) -> None:
        """Stop listening; does nothing the second time."""
        listening = self._subscriptions.get(subscription.generation_id, [])
        if subscription in listening:
            listening.remove(subscription)
            self._num_subscriptions -= not subscription.in_background
            if not listening:
                del self._subscriptions[subscription.generation_id]

    def dispatch(self, items: Iterable[ReplyItem]) -> None:
        """Hand items to their subscriptions; those of generations that nobody listens to here are dropped."""
        for item in items:
            for subscription in self._subscriptions.get(item.generation_id, ()):
                subscription.offer(item)


def _bytes_of_alternatives(found: Iterable[Alternatives]) -> int:
    return sum(_PART_BYTES + len(one) * _ALTERNATIVE_BYTES for one in found)


def _bytes_of(item: ReplyItem) -> int:
    """About how much memory an item takes."""
    size = _PART_BYTES
    if isinstance(item.body, EventBody):
        for delta in item.body.deltas:
            size += _PART_BYTES + getsizeof(delta.text)  # of a character up to four bytes
            size += _TOKEN_ID_BYTES * (len(delta.token_ids) + len(delta.ranks)) + _LOGPROB_BYTES * len(delta.logprobs)
            size += _bytes_of_alternatives(delta.top_logprobs)
            if delta.reasoning_text:
                size += getsizeof(delta.reasoning_text)
            for call in delta.tool_calls:
                size += _PART_BYTES + getsizeof(call.name) + getsizeof(call.arguments)
        scores = item.body.prompt_scores
        if scores is not None:
            size += _PART_BYTES + 2 * _LOGPROB_BYTES * len(scores.logprobs)
            size += _bytes_of_alternatives(scores.top_logprobs)
        if item.body.result is not None:
            size += bytes_of_result(item.body.result)
    return size

"""From the reply streams to the calls that wait: who listens to which generation in this process.

The reply stream is only the fast way to hear of an event; the log is the truth. So everything here may be lost: a
subscription that missed something, or holds too much, is told to read the log.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from common.errors import Superseded
from common.jobs import ItemKind, ReplyItem


class Subscription:
    """What one call has not yet taken of its generation's items. Used from one event loop."""

    def __init__(self, generation_id: str, max_pending: int) -> None:
        self.generation_id = generation_id
        self.superseded = False
        self._max_pending = max_pending
        self._pending: deque[ReplyItem] = deque()
        self._overflowed = False
        self._wake = asyncio.Event()

    def offer(self, item: ReplyItem) -> None:
        """Take an item; a slow call's items are dropped, since it can read them in the log when it has time."""
        if item.kind is ItemKind.SUPERSEDED:
            self.superseded = True
        elif len(self._pending) >= self._max_pending:
            self._pending.clear()
            self._overflowed = True
        else:
            self._pending.append(item)
        self._wake.set()

    def supersede(self) -> None:
        """End this subscription: another call of this process took its place."""
        self.superseded = True
        self._wake.set()

    async def take(self, timeout_s: float) -> tuple[ReplyItem, ...] | None:
        """Return everything that waits, at least one item; None when the log must be read: nothing came, or too much.

        Raises Superseded once another stream of this generation was attached.
        """
        if not self._wake.is_set():
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                return None
        self._wake.clear()
        if self.superseded:
            self._wake.set()
            raise Superseded
        if self._overflowed:
            self._overflowed = False
            self._pending.clear()
            return None
        items = tuple(self._pending)
        self._pending.clear()
        return items or None


class EventHub:
    """The subscriptions of this process, by generation."""

    def __init__(self, max_pending: int) -> None:
        self._max_pending = max_pending
        self._subscriptions: dict[str, Subscription] = {}

    def __len__(self) -> int:
        return len(self._subscriptions)

    def has(self, generation_id: str) -> bool:
        """Whether a call listens to this generation here."""
        return generation_id in self._subscriptions

    def subscribe(self, generation_id: str) -> Subscription:
        """Listen to a generation. The latest call wins: an earlier subscription ends with Superseded."""
        earlier = self._subscriptions.get(generation_id)
        if earlier is not None:
            earlier.supersede()
        subscription = Subscription(generation_id, self._max_pending)
        self._subscriptions[generation_id] = subscription
        return subscription

    def unsubscribe(self, subscription: Subscription) -> bool:
        """Stop listening; return whether this subscription was still the generation's current one."""
        if self._subscriptions.get(subscription.generation_id) is not subscription:
            return False
        del self._subscriptions[subscription.generation_id]
        return not subscription.superseded

    def dispatch(self, items: Iterable[ReplyItem]) -> None:
        """Hand items to their subscriptions; those of generations that nobody listens to here are dropped."""
        for item in items:
            subscription = self._subscriptions.get(item.generation_id)
            if subscription is not None:
                subscription.offer(item)

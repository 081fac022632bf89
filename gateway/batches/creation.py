"""Making a batch of a stream of requests: each is checked and stored as it comes, and none counts before the last."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator
from typing import Final

from common import errors, keys
from common.batches import MAX_APPENDED, Batches, BatchRecord, NewBatch, Owner
from gateway import audit
from gateway.batches.items import ItemRules, check_header, check_item, priority_of
from gateway.identity.caller import Caller
from gateway.secret import SharedSecret
from gateway.settings import GatewaySettings
from torchrelay.v1 import batch_pb2 as pb

_APPENDED_BYTES: Final = 256 << 10


class Maker:
    """Makes batches. One call is one use of `make`."""

    def __init__(
        self, batches: Batches, settings: GatewaySettings, secret: SharedSecret, kinds: frozenset[str]
    ) -> None:
        """`kinds` of requests can be run here."""
        self._batches = batches
        self._settings = settings
        self._secret = secret
        self._rules = ItemRules(kinds, settings.reveal_models)

    async def make(self, requests: AsyncIterator[pb.CreateBatchRequest], caller: Caller) -> tuple[BatchRecord, bool]:
        """Return the batch, and whether an earlier call had made it. Raises ServingError; nothing is kept then."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise errors.InvalidRequest("the first message must be the header", reason="FIELD_REQUIRED", field="header")
        header = first.header
        idempotency_key = check_header(header)
        priority = priority_of(header.priority, caller)
        known = await self._batches.earlier(caller.tenant, idempotency_key) if idempotency_key else None
        items = _Items(self._settings, caller, self._rules, header, await self._secret.get())
        batch_id = keys.new_batch_id()
        try:
            async for request in requests:
                items.take(request)
                if items.is_page_full:
                    await self._append(batch_id, caller, items, is_known=known is not None)
            if not items.count:
                raise errors.InvalidRequest("a batch needs an item", reason="FIELD_REQUIRED", field="items")
            await self._append(batch_id, caller, items, is_known=known is not None)
        except BaseException:
            if known is None and items.num_appended:  # they would expire
                with contextlib.suppress(errors.ServingError):
                    await asyncio.shield(self._batches.discard(caller.tenant, batch_id))
            raise
        audit.note(num_items=items.count, priority=priority, request_digest=items.digest[:16].hex())
        if known is not None:
            earlier_id, digest = known
            if digest != items.digest:
                raise errors.IdempotencyKeyReused
            audit.note(batch_id=earlier_id)
            try:
                return await self._batches.get(caller.tenant, earlier_id), True
            except errors.BatchNotFound:
                message = "the batch that was made with this key has just expired; repeat the call to make another"
                raise errors.Unavailable(message, reason="BATCH_LOST") from None
        settings = self._settings
        record, replayed = await self._batches.start(
            NewBatch(
                batch_id=batch_id,
                owner=Owner(caller.tenant, caller.key_id, caller.method, caller.quota_id, caller.grants),
                total=items.count,
                priority=priority,
                display_name=header.display_name,
                idempotency_key=idempotency_key,
                request_digest=items.digest,
                max_batches=settings.max_batches_per_tenant,
                retention_ms=int(settings.batch_retention_s * 1000),
                lifetime_ms=int(settings.batch_lifetime_s * 1000),
            )
        )
        audit.note(batch_id=record.batch_id)
        audit.mark("batch.repeated" if replayed else "batch.accepted")
        return record, replayed

    async def _append(self, batch_id: str, caller: Caller, items: _Items, *, is_known: bool) -> None:
        page = items.take_page()
        if page and not is_known:
            await self._batches.append(caller.tenant, batch_id, items.num_appended - len(page), page)


class _Items:
    """The items of one call: held to their rules, counted, and kept until a page is full."""

    def __init__(
        self, settings: GatewaySettings, caller: Caller, rules: ItemRules, header: pb.BatchHeader, secret: bytes
    ) -> None:
        self._settings = settings
        self._caller = caller
        self._rules = rules
        self._ids: set[str] = set()
        self._page: list[bytes] = []
        self._page_bytes = 0
        self._num_bytes = 0
        self.num_appended = 0
        # Keyed, so that what is stored says nothing about a guessed request.
        self._digest = hmac.new(secret, b"batch\0", "sha256")
        told = pb.BatchHeader(priority=header.priority, display_name=header.display_name)
        self._add_to_digest(told.SerializeToString(deterministic=True))

    @property
    def count(self) -> int:
        return len(self._ids)

    @property
    def digest(self) -> bytes:
        """What must be equal when an idempotency key is used again."""
        return self._digest.digest()

    @property
    def is_page_full(self) -> bool:
        return len(self._page) >= MAX_APPENDED or self._page_bytes >= _APPENDED_BYTES

    def take(self, request: pb.CreateBatchRequest) -> None:
        """Raises InvalidRequest and what `check_item` raises."""
        index, settings = self.count, self._settings
        if request.WhichOneof("part") != "item":
            raise errors.InvalidRequest(
                "an item is required behind the header", reason="FIELD_REQUIRED", field=f"items[{index}]"
            )
        if index >= settings.max_batch_items:
            raise errors.InvalidRequest(
                f"a batch has at most {settings.max_batch_items} items",
                reason="FIELD_OUT_OF_RANGE",
                field="items",
                limit=settings.max_batch_items,
            )
        item = request.item
        check_item(item, index, self._caller, self._rules)
        custom_id = item.custom_id or str(index)
        if custom_id in self._ids:
            raise errors.InvalidRequest(
                "another item of the batch has this id", reason="FIELD_CONFLICT", field=f"items[{index}].custom_id"
            )
        data = item.SerializeToString(deterministic=True)
        self._num_bytes += len(data)
        if self._num_bytes > settings.max_batch_bytes:
            raise errors.InvalidRequest(
                f"the items of a batch have at most {settings.max_batch_bytes} bytes together",
                reason="FIELD_OUT_OF_RANGE",
                field="items",
                limit=settings.max_batch_bytes,
            )
        self._ids.add(custom_id)
        self._add_to_digest(data)
        self._page.append(data)
        self._page_bytes += len(data)

    def take_page(self) -> list[bytes]:
        page, self._page, self._page_bytes = self._page, [], 0
        self.num_appended += len(page)
        return page

    def _add_to_digest(self, data: bytes) -> None:
        self._digest.update(len(data).to_bytes(8, "little") + data)

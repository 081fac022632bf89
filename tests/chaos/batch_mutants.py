"""Batches with one guard taken out: `make batch-chaos ARGS="--mutant NAME"` must see each."""

from __future__ import annotations

import uuid
from typing import Any, Final

from tests.chaos.mutants import _edit
from tests.chaos.patches import patch

BATCH_MUTANTS: Final = ("batch_without_guard", "batch_with_new_keys", "batch_without_takeover")


@patch
def batch_without_guard(_: str) -> None:
    """A result is appended whether the item has one or not, and it is not noted that it has."""
    _edit("batch_result", "if call('GETBIT', B .. ':done', index) == 0 then -- mutant: once", "if true then")
    _edit("batch_result", "call('SETBIT', B .. ':done', index, 1)", "")


@patch
def batch_with_new_keys(_: str) -> None:
    """An item's job cannot be found again: whoever takes a batch over runs it once more."""
    from gateway.batches.feeder import Feeder

    real = Feeder._prepare

    def prepare(self: Feeder, index: int, item: Any) -> Any:
        runner, request = real(self, index, item)
        request.idempotency_key = uuid.uuid4().hex
        return runner, request

    Feeder._prepare = prepare  # type: ignore[method-assign]


@patch
def batch_without_takeover(_: str) -> None:
    """Nobody takes up a batch whose feeder has died, before long."""
    _edit("batch_lease", "tonumber(fields[4]) > now", "tonumber(fields[4]) > now - 3600000")

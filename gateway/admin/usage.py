"""UsageService: sums of what the scripts have counted."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import grpc.aio

from common.errors import InvalidRequest
from common.usage import KEPT_HOURS, Counts, UsageKey, UsageReader
from gateway.admin import messages
from gateway.catalog import Catalog
from torchrelay.admin.v1beta1 import usage_pb2 as pb
from torchrelay.admin.v1beta1 import usage_pb2_grpc as pb_grpc

_DEFAULT_HOURS: Final = 24
_MAX_ROWS: Final = 10_000
_DIMENSIONS: Final = {
    pb.USAGE_DIMENSION_TENANT: "tenant",
    pb.USAGE_DIMENSION_KEY: "key_id",
    pb.USAGE_DIMENSION_MODEL: "model",
    pb.USAGE_DIMENSION_HOUR: "hour",
}


class UsageServicer(pb_grpc.UsageServiceServicer):
    """Answers out of the shards of all registered models."""

    def __init__(self, catalog: Catalog, usage: UsageReader) -> None:
        self._catalog = catalog
        self._usage = usage

    async def QueryUsage(  # noqa: N802 - the method's name in the contract
        self, request: pb.QueryUsageRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.QueryUsageResponse:
        for index, dimension in enumerate(request.group_by):
            if dimension not in _DIMENSIONS:
                raise InvalidRequest("must be a dimension", reason="FIELD_INVALID", field=f"group_by[{index}]")
        names = {_DIMENSIONS[dimension] for dimension in request.group_by}
        hours = _hours(request, await self._usage.now_hour())
        models = {
            entry.card.shard: entry.card.name
            for entry in self._catalog.all_entries()
            if not request.model or entry.card.name == request.model
        }
        sums: dict[tuple[int, str, str, str], Counts] = defaultdict(Counts)
        for key, counts in (await self._usage.read(models, hours)).items():
            if request.tenant in ("", key.tenant) and request.key_id in ("", key.key_id):
                sums[_group(key, models[key.shard], names)].add(counts)
        if len(sums) > _MAX_ROWS:
            raise InvalidRequest(
                "ask for fewer dimensions or a shorter time",
                reason="TOO_MANY_ROWS",
                field="group_by",
                limit=_MAX_ROWS,
                got=len(sums),
            )
        return pb.QueryUsageResponse(rows=[_row(group, sums[group], names) for group in sorted(sums)])


def _hours(request: pb.QueryUsageRequest, now_hour: int) -> range:
    last = (
        min(now_hour, messages.milliseconds_of(request.end_time, "end_time") // 3_600_000)
        if request.HasField("end_time")
        else now_hour
    )
    first = last - _DEFAULT_HOURS + 1
    if request.HasField("start_time"):
        first = messages.milliseconds_of(request.start_time, "start_time") // 3_600_000
        if first > last:
            raise InvalidRequest("must not be after end_time", reason="FIELD_OUT_OF_RANGE", field="start_time")
    return range(max(first, now_hour - KEPT_HOURS), last + 1)


def _group(key: UsageKey, model: str, names: set[str]) -> tuple[int, str, str, str]:
    return (
        key.hour if "hour" in names else 0,
        key.tenant if "tenant" in names else "",
        model if "model" in names else "",
        key.key_id if "key_id" in names else "",
    )


def _row(group: tuple[int, str, str, str], counts: Counts, names: set[str]) -> pb.UsageRow:
    hour, tenant, model, key_id = group
    row = pb.UsageRow(
        tenant=tenant,
        key_id=key_id,
        model=model,
        generations=counts.generations,
        prompt_tokens=counts.prompt_tokens,
        cached_prompt_tokens=counts.cached_prompt_tokens,
        completion_tokens=counts.completion_tokens,
    )
    if "hour" in names:
        row.hour.FromSeconds(hour * 3600)
    return row

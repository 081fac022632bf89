"""Over a real server and socket: what a caller may not call, and quotas that are spent."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from common import errors
from gateway.identity.caller import Caller
from gateway.interceptors.guard import Guard
from tests.unit.gateway.test_guard import _GET, Toy, authenticate, channel, fail_with, get, refusal, serving, toy

__all__ = ["channel", "toy"]  # fixtures


@pytest.mark.parametrize(
    ("error", "pushback"),
    [
        (errors.RateLimited("a", subject="key:requests_per_minute", limit=3, retry_after_ms=20), "20"),
        (errors.QuotaExceeded("a", subject="tenant:tokens_per_day", limit=3), "-1"),
        (errors.InvalidRequest("a"), None),
    ],
    ids=["rate", "day", "other"],
)
async def test_a_spent_quota_names_itself_and_tells_grpc_when_to_try_again(
    channel: grpc.aio.Channel, toy: Toy, error: errors.ServingError, pushback: str | None
) -> None:
    fail_with(toy, error)
    with pytest.raises(grpc.aio.AioRpcError) as limited:
        await get(channel)
    trailers: dict[str, Any] = dict(limited.value.trailing_metadata())
    assert trailers.get("grpc-retry-pushback-ms") == pushback
    status, quota = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]), error_details_pb2.QuotaFailure()
    found = [detail for detail in status.details if detail.Unpack(quota)]
    assert [v.subject for v in quota.violations] == ([error.subject] if isinstance(error, errors.Limited) else [])
    assert bool(found) == isinstance(error, errors.Limited)


async def test_a_method_outside_the_caller_s_scopes_is_not_called(toy: Toy) -> None:
    def forbid(method: str, caller: Caller) -> None:
        assert (method, caller.tenant) == (_GET, "acme")
        raise errors.PermissionDenied("not this")

    async with serving(toy, Guard(authenticate, authorize=forbid)) as channel:
        refused = await refusal(get(channel))
    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "METHOD_NOT_ALLOWED")
    assert toy.calls == []

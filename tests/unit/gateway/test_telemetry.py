"""What a gateway counts: calls over a real socket, streams by how they came about, queues as it saw them last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from common import errors
from common.jobs import QueueShape, Swept, WaitingClass
from common.telemetry.upkeep import UpkeepCounters
from gateway.identity.caller import Caller
from gateway.interceptors.guard import Guard
from gateway.telemetry.calls import SERVER_STREAM, UNARY, GrpcMeter, OpenAiMeter, TenantCalls
from gateway.telemetry.queues import ModelQueue, QueueFigures
from gateway.telemetry.streams import Opening, StreamMetrics
from tests.builders_metrics import value
from tests.unit.gateway.test_guard import Toy, authenticate, get, read, serving
from torchrelay.v1 import generation_pb2 as pb

SERVICE = "torchrelay.v1.GenerationService"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
async def channel(toy: Toy, registry: CollectorRegistry) -> AsyncIterator[grpc.aio.Channel]:
    meter = GrpcMeter(registry, TenantCalls(registry, 10))
    async with serving(toy, Guard(authenticate, meter=meter)) as opened:
        yield opened


def calls(registry: CollectorRegistry, name: str, method: str, kind: str = UNARY, **labels: str) -> float:
    return value(registry, f"grpc_server_{name}", grpc_type=kind, grpc_service=SERVICE, grpc_method=method, **labels)


async def test_unary_calls_by_code(channel: grpc.aio.Channel, registry: CollectorRegistry) -> None:
    await get(channel)
    with pytest.raises(grpc.aio.AioRpcError):
        await get(channel, metadata=())
    with pytest.raises(grpc.aio.AioRpcError):
        await get(channel, b"\xff")
    assert calls(registry, "started_total", "GetGeneration") == 3
    for code in ("OK", "UNAUTHENTICATED", "INVALID_ARGUMENT"):
        assert calls(registry, "handled_total", "GetGeneration", grpc_code=code) == 1
    assert calls(registry, "handling_seconds_count", "GetGeneration") == 3
    errors_of = {"grpc_service": SERVICE, "grpc_method": "GetGeneration"}
    assert (
        value(
            registry,
            "torchrelay_call_errors_total",
            grpc_code="INVALID_ARGUMENT",
            reason="MALFORMED_MESSAGE",
            **errors_of,
        )
        == 1
    )
    # Whose call it was is known only once it is let in.
    assert value(registry, "torchrelay_tenant_calls_total", tenant="acme", grpc_code="OK") == 1
    assert value(registry, "torchrelay_tenant_calls_total", tenant="acme", grpc_code="INVALID_ARGUMENT") == 1


async def test_messages_of_a_stream(channel: grpc.aio.Channel, toy: Toy, registry: CollectorRegistry) -> None:
    assert len(await read(channel)) == 3

    async def breaks(request: Any, context: Any) -> AsyncIterator[pb.StreamGenerateResponse]:
        yield pb.StreamGenerateResponse()
        raise errors.Aborted("another call has taken the stream over", reason="SUPERSEDED")

    toy.stream = breaks
    with pytest.raises(grpc.aio.AioRpcError):
        await read(channel)
    assert calls(registry, "msg_sent_total", "StreamGenerate", SERVER_STREAM) == 4
    assert calls(registry, "handled_total", "StreamGenerate", SERVER_STREAM, grpc_code="OK") == 1
    assert calls(registry, "handled_total", "StreamGenerate", SERVER_STREAM, grpc_code="ABORTED") == 1


async def test_methods_that_do_not_exist_make_no_series(channel: grpc.aio.Channel, registry: CollectorRegistry) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await channel.unary_unary("/torchrelay.v1.Nothing/At" + "x" * 50)(b"")
    assert not [sample for family in registry.collect() for sample in family.samples]


def test_openai_requests_and_grpc_calls_share_the_tenants(registry: CollectorRegistry) -> None:
    tenants = TenantCalls(registry, 1)
    for meter in (GrpcMeter(registry, tenants), OpenAiMeter(registry, tenants)):
        meter.ended("/torchrelay.v1.S/M", UNARY, Caller("acme", "k"), "OK", "", 0.5)
        meter.ended("/torchrelay.v1.S/M", UNARY, Caller("emca", "k"), "ABORTED", "SUPERSEDED", 0.5)
        meter.ended("/torchrelay.v1.S/M", UNARY, None, "UNAUTHENTICATED", "CREDENTIALS_MISSING", 0.5)
    assert value(registry, "torchrelay_tenant_calls_total", tenant="acme", grpc_code="OK") == 2
    assert value(registry, "torchrelay_tenant_calls_total", tenant="other", grpc_code="ABORTED") == 2
    assert value(registry, "torchrelay_openai_request_seconds_sum", grpc_method="M") == 1.5


async def test_streams_are_timed_from_their_calls_arrival(registry: CollectorRegistry) -> None:
    clock = Clock()
    metrics = StreamMetrics(registry, clock)
    watch = metrics.watch("tiny", Opening.NEW, 0.0)
    for at, num_tokens in ((0.5, 1), (0.9, 4), (1.0, 0), (1.2, 3)):
        clock.now = at
        watch.passed(num_tokens)
    await asyncio.sleep(0)
    assert value(registry, "torchrelay_gateway_time_to_first_token_seconds_sum", model_name="tiny") == 0.5
    gap = value(registry, "torchrelay_gateway_inter_token_latency_seconds_sum", model_name="tiny")
    assert gap == pytest.approx(0.4 / 4 + 0.3 / 3)
    assert value(registry, "torchrelay_streams_opened_total", model_name="tiny", kind="new") == 1


@pytest.mark.parametrize(("kind", "began_at"), [(Opening.RESUMED, 0.0), (Opening.REPEATED, 0.0), (Opening.NEW, None)])
async def test_what_is_replayed_or_nobody_waits_for_is_not_timed(
    registry: CollectorRegistry, kind: Opening, began_at: float | None
) -> None:
    metrics = StreamMetrics(registry)
    metrics.watch("tiny", kind, began_at).passed(2)
    await asyncio.sleep(0)
    assert value(registry, "torchrelay_gateway_time_to_first_token_seconds_count", model_name="tiny") == 0
    assert value(registry, "torchrelay_streams_opened_total", model_name="tiny", kind=kind.value) == 1


def shape(*classes: tuple[int, int | None, int | None], running: int = 0, dead: int = 0) -> QueueShape:
    """A queue; of each class how many wait, the age of the oldest and the expected wait, in ms."""
    waiting = tuple(WaitingClass(index, *one) for index, one in enumerate(classes))
    return QueueShape(0, waiting, (), has_more_tenants=False, num_running=running, num_dead_letters=dead)


EMPTY = (0, None, None)


def gauges(figures: QueueFigures) -> dict[str, float]:
    return {
        ",".join((sample.name.removeprefix("torchrelay_"), *sorted(sample.labels.values()))): sample.value
        for family in figures.collect()
        for sample in family.samples
    }


def test_revisions_of_a_model_stand_together() -> None:
    figures = QueueFigures(Clock())
    old = ModelQueue("tiny", 1, shape((1, 700, 100), (2, 4000, 900), EMPTY, running=3, dead=1))
    new = ModelQueue("tiny", 2, shape(EMPTY, (5, 1000, 2000), EMPTY, running=4))
    figures.update([old, new], 0.25)
    found = gauges(figures)
    assert found == {
        "redis_up": 1,
        "redis_memory_used_ratio": 0.25,
        "workers,tiny": 3,
        "jobs_running,tiny": 7,
        "dead_letters,tiny": 1,
        "queue_expected_wait_seconds,tiny": 2.0,
        "queue_jobs,high,tiny": 1,
        "queue_jobs,normal,tiny": 7,
        "queue_jobs,low,tiny": 0,
        "queue_oldest_age_seconds,high,tiny": 0.7,
        "queue_oldest_age_seconds,normal,tiny": 4.0,
        "queue_oldest_age_seconds,low,tiny": 0,
    }


def test_wait_that_nobody_knows_is_at_least_the_oldest_ones() -> None:
    figures = QueueFigures(Clock())
    figures.update([ModelQueue("cold", 0, shape(EMPTY, (1, 9000, None), EMPTY))], 0)
    assert gauges(figures)["queue_expected_wait_seconds,cold"] == 9
    figures.update([ModelQueue("cold", 0, shape(EMPTY, EMPTY, EMPTY))], 0)
    assert gauges(figures)["queue_expected_wait_seconds,cold"] == 0


def test_old_figures_are_not_told_and_a_lost_server_is() -> None:
    clock = Clock()
    figures = QueueFigures(clock)
    assert gauges(figures) == {"redis_up": 0, "redis_memory_used_ratio": 0}
    figures.update([ModelQueue("tiny", 1, shape(EMPTY, EMPTY, EMPTY))], 0)
    figures.lose()
    assert gauges(figures)["redis_up"] == 0
    assert gauges(figures)["workers,tiny"] == 1
    clock.now += 20
    assert gauges(figures) == {"redis_up": 0}


def test_upkeep_is_counted_by_outcome(registry: CollectorRegistry) -> None:
    counters = UpkeepCounters(registry)
    counters.count("tiny", Swept(requeued=2), Swept(expired=1))
    counters.count("tiny", Swept(), Swept(expired=1))
    assert value(registry, "torchrelay_upkeep_jobs_total", model_name="tiny", outcome="requeued") == 2
    assert value(registry, "torchrelay_upkeep_jobs_total", model_name="tiny", outcome="expired") == 2

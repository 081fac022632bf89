"""One gateway process: reads settings, builds the objects, runs them, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from importlib.metadata import version

import structlog
import uvloop

from common import keys
from common.api_keys import ApiKeys
from common.batches import Batches
from common.dead_letters import DeadLetters
from common.embedded import describe_durability
from common.errors import ServingError
from common.headroom import Headroom
from common.job_queue import JobQueue
from common.late_log import late_log
from common.quotas import QuotaMeter
from common.redis import Retry, block_ms, connect
from common.registry import ModelDirectory, ModelRegistry
from common.replication import ReplicaAcks
from common.startup import ignore_signals, read_settings, settle_heap, stop_at_signals
from common.telemetry.log_levels import LevelFollower, LogLevels
from common.telemetry.monitor import MonitorServer, Vitals
from common.tenants import Tenants
from common.usage import UsageReader
from gateway.admin.access import operator_authenticator
from gateway.admin.api_keys import ApiKeyServicer
from gateway.admin.fleet import FleetServicer
from gateway.admin.logs import LogServicer
from gateway.admin.tenants import TenantServicer
from gateway.admin.usage import UsageServicer
from gateway.admission import Admission
from gateway.audit import Audit, AuditFile
from gateway.batches.assembly import build_batching
from gateway.batches.running import Owners
from gateway.catalog import Catalog
from gateway.configuration import GatewayConfiguration
from gateway.delivery import EventHub
from gateway.generations import Generations
from gateway.identity.assembly import build_authenticator
from gateway.identity.settings import IDENTITY_SETTINGS
from gateway.interceptors.guard import Guard
from gateway.model_servicer import ModelServicer
from gateway.openai.app import OpenAiDoor
from gateway.openai.exchange import Door, bodies_of
from gateway.openai.server import OpenAiServer
from gateway.rights import check_method
from gateway.secret import SharedSecret
from gateway.server import GatewayServer, certificates_of, is_admin_open
from gateway.servicer import GenerationServicer
from gateway.settings import GatewaySettings
from gateway.stream import StreamFactory, StreamTimes
from gateway.tasks.core import Tasks
from gateway.tasks.servicers import ClassificationServicer, EmbeddingServicer
from gateway.telemetry.assembly import GatewayMetrics
from gateway.telemetry.spans import make_call_tracer
from gateway.tls import CertificateError
from gateway.upkeep import Upkeep
from torchrelay.admin.v1beta1 import api_key_pb2_grpc, fleet_pb2_grpc, log_pb2_grpc, tenant_pb2_grpc, usage_pb2_grpc
from torchrelay.v1 import (
    batch_pb2_grpc,
    classification_pb2_grpc,
    embedding_pb2_grpc,
    generation_pb2_grpc,
    model_pb2_grpc,
)

log = structlog.get_logger()

_BLOCK_MS = 2000


async def run(configuration: GatewayConfiguration, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain. Raises OSError if an address cannot be bound, and CertificateError."""
    settings, redis_settings, queue_settings = configuration.gateway, configuration.redis, configuration.queue
    sealer, tracing = configuration.sealer, configuration.tracing
    metrics, vitals = GatewayMetrics(configuration.metrics), Vitals()
    monitor = MonitorServer(settings.metrics_address, metrics.registry, vitals) if settings.metrics_address else None
    tracer = make_call_tracer(tracing)
    retry = Retry.from_settings(redis_settings)
    redis, blocking_redis, waiting_redis = (connect(redis_settings) for _ in range(3))
    admin_url = settings.admin_redis_url or redis_settings.url
    admin_redis = connect(redis_settings.model_copy(update={"url": admin_url}))
    headroom = Headroom(redis, queue_settings.max_memory_share, retry=retry)
    queue = JobQueue(
        redis,
        keys.random_id(),
        queue_settings,
        retry=retry,
        blocking_redis=blocking_redis,
        headroom=headroom,
        acks=ReplicaAcks(waiting_redis, redis_settings),
        sealer=sealer,
    )
    registry = ModelRegistry(redis, retry=retry)
    catalog = Catalog(ModelDirectory(registry, queue), registry)
    hub = EventHub(settings.max_pending_events, settings.max_pending_bytes)
    streams = StreamFactory(
        queue,
        hub,
        StreamTimes(settings.reconcile_interval_s, settings.progress_interval_s),
        sealer,
        metrics.streams,
    )
    secret = SharedSecret(redis, admin_redis, retry)

    tenants = Tenants(redis, retry=retry)
    authenticator = build_authenticator(
        configuration.identity, configuration.proxies, ApiKeys(redis, retry=retry), tenants
    )
    audit_file = AuditFile(settings.audit_file) if settings.audit_file is not None else None
    guard = Guard(
        authenticator.authenticate,
        authorize=check_method,
        audit=Audit(audit_file),
        meter=metrics.grpc,
        tracer=tracer,
        send_timeout_s=settings.send_timeout_s,
    )
    operator = operator_authenticator(authenticator.authenticate, is_open=is_admin_open(settings))
    server = GatewayServer(
        settings,
        guard,
        Guard(operator, authorize=check_method, audit=Audit(audit_file, to_log=True), meter=metrics.grpc),
    )
    quotas = QuotaMeter(redis, queue_settings.max_lifetime_ms + queue_settings.retention_ms, retry=retry)
    admission = Admission(queue, quotas)
    generations = Generations(queue, admission, streams, catalog, settings, secret)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(generations), server.public)
    tasks = Tasks(generations, catalog, settings, secret, queue_settings.max_log_bytes)
    embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(EmbeddingServicer(tasks), server.public)
    classification_pb2_grpc.add_ClassificationServiceServicer_to_server(ClassificationServicer(tasks), server.public)
    batching = build_batching(
        Batches(
            redis,
            queue.gateway_id,
            retry=retry,
            headroom=headroom,
            acks=ReplicaAcks(waiting_redis, redis_settings),
            sealer=sealer,
        ),
        queue,
        admission,
        streams,
        catalog,
        generations,
        tasks,
        Owners(ApiKeys(redis, retry=retry), tenants),
        secret,
        settings,
        queue_settings,
    )
    batch_pb2_grpc.add_BatchServiceServicer_to_server(batching.servicer, server.public)
    door = Door(
        authenticator.authenticate,
        check_method,
        Audit(audit_file),
        bodies=bodies_of(settings),
        send_timeout_s=settings.send_timeout_s,
        meter=metrics.openai,
        tracer=tracer,
    )
    openai = OpenAiServer(
        OpenAiDoor(generations, tasks, catalog, settings, door).app, settings, certificates_of(settings)
    )
    model_pb2_grpc.add_ModelServiceServicer_to_server(
        ModelServicer(catalog, queue, reveal=settings.reveal_models), server.public
    )
    api_key_pb2_grpc.add_ApiKeyServiceServicer_to_server(
        ApiKeyServicer(ApiKeys(admin_redis, retry=retry)), server.admin
    )
    dead_letters = DeadLetters(redis, queue_settings, retry=retry, headroom=headroom, sealer=sealer)
    fleet = FleetServicer(catalog, queue, dead_letters, num_streams=lambda: len(hub))
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server.admin)
    tenant_pb2_grpc.add_TenantServiceServicer_to_server(TenantServicer(Tenants(admin_redis, retry=retry)), server.admin)
    log_pb2_grpc.add_LogServiceServicer_to_server(LogServicer(LogLevels(admin_redis, retry=retry)), server.admin)
    usage_pb2_grpc.add_UsageServiceServicer_to_server(
        UsageServicer(catalog, UsageReader(redis, retry=retry)), server.admin
    )

    async def on_connected() -> None:
        await server.health.set_ready(True)
        vitals.set_ready()
        log.info("queue.durability", promise=(await describe_durability(redis)).summary())
        log.info(
            "gateway.ready",
            address=server.address,
            admin_address=server.admin_address,
            openai_address=openai.address,
        )

    upkeep = Upkeep(
        queue,
        hub,
        streams,
        catalog,
        headroom,
        admission,
        metrics.queues,
        metrics.upkeep,
        interval_s=min(settings.maintenance_interval_s, queue_settings.max_upkeep_pause_s),
        block_ms=block_ms(redis_settings, _BLOCK_MS),
        on_connected=on_connected,
    )
    metrics.count_open(hub, batching.feeders)
    await server.start()
    await openai.start()
    settle_heap()
    log.info(
        "gateway.started",
        address=server.address,
        openai_address=openai.address,
        metrics_address=monitor.address if monitor is not None else "",
        gateway_id=queue.gateway_id,
        version=version("torchrelay"),
    )
    beating = asyncio.create_task(vitals.run())
    following = asyncio.create_task(LevelFollower(LogLevels(redis, retry=retry)).run())
    running = asyncio.create_task(upkeep.run())
    feeding = asyncio.create_task(batching.feeders.run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        log.info("gateway.draining", streams=len(hub), batches=len(batching.feeders))
        vitals.set_unready("draining")
        feeding.cancel()  # other gateways go on with what this one has fed
        fleet.stop()
        await asyncio.gather(server.stop(), openai.stop())
    finally:
        stopping.cancel()
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        upkeep.stop()
        await running
        await authenticator.aclose()
        with contextlib.suppress(ServingError):
            await queue.leave(catalog.shards())
        for client in (redis, blocking_redis, waiting_redis, admin_redis):
            await client.aclose()
        for task in (beating, following):
            task.cancel()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        if monitor is not None:
            monitor.close()
        late_log.flush()
    log.info("gateway.stopped")


async def _main(configuration: GatewayConfiguration) -> None:
    stop = asyncio.Event()
    stop_at_signals(stop)
    await run(configuration, stop)


def main() -> int:
    """Run a gateway from the environment's settings; return the exit status."""
    configuration = read_settings(GatewayConfiguration.read, GatewaySettings, *IDENTITY_SETTINGS)
    try:
        uvloop.run(_main(configuration))
        ignore_signals()
    except (OSError, CertificateError) as error:
        log.error("gateway.failed", error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

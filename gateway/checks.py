"""What `torchrelay doctor` looks at of the gateway: ports, certificates, and as a caller the gateway and its models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from common.diagnosis.findings import Check, Finding, Surroundings, failure, ok, warning
from common.grants import Scope
from gateway.settings import GatewaySettings
from gateway.tls import CertificateError, read_certificates
from torchrelay.admin.v1beta1 import (
    api_key_pb2,
    api_key_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    tenant_pb2,
    tenant_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from torchrelay.cli.connection import Connection
from torchrelay.client import AsyncClient, RelayError, Tls
from torchrelay.client.channel import auth_metadata, is_loopback
from torchrelay.client.errors import from_rpc_error
from torchrelay.v1 import batch_pb2, embedding_pb2, model_pb2
from torchrelay.v1 import generation_pb2 as pb

_ANSWER_S: Final = 5.0
_MAX_ANSWER_BYTES: Final = 1 << 16
_EXPIRES_SOON: Final = timedelta(days=14)
_PORTS: Final = ("address", "mtls_address", "admin_address", "openai_address", "health_address")
_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
_START: Final = "start one with `torchrelay serve` or `torchrelay gateway`, or name its address with --address"


def checks() -> Sequence[Check]:
    """The entry point of `torchrelay.checks`."""
    return (check_ports, check_certificates, check_gateway, check_operators)


async def check_ports(where: Surroundings) -> Sequence[Finding]:
    """Whether a gateway with these settings could listen, or listens already."""
    try:
        settings = GatewaySettings()
    except ValidationError:
        return []  # the settings' own check says so
    addresses = {name: getattr(settings, name) for name in _PORTS}
    has_tls = settings.tls_cert_file is not None
    return [
        await _port(name, address, has_tls=has_tls)
        for name, address in addresses.items()
        if address and not address.startswith("unix:")
    ]


async def _port(name: str, address: str, *, has_tls: bool) -> Finding:
    variable = f"TORCHRELAY_GATEWAY_{name.upper()}"
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal() or int(port) >= 1 << 16:
        return failure("ports", f"{variable}={address} is not host:port", f"set {variable} to an address of this host")
    target = f"{_ANY_ADDRESS.get(host, host)}:{port}"
    try:
        async with asyncio.timeout(_ANSWER_S):
            _, writer = await asyncio.open_connection(_ANY_ADDRESS.get(host, host), int(port))
            writer.close()
    except (OSError, TimeoutError):
        return ok("ports", f"{address} ({name}) is free")
    if has_tls and name != "health_address":
        return ok("ports", f"{address} ({name}) is in use, over TLS as set")
    if await (_speaks_http(target) if name == "openai_address" else _is_gateway(target, name)):
        return ok("ports", f"{address} ({name}) is answered by a gateway")
    what = f"{address} ({name}) is taken by another program"
    return failure("ports", what, f"end that program, or set {variable} to another port")


async def _is_gateway(target: str, name: str) -> bool:
    async with grpc.aio.insecure_channel(target) as channel:
        try:
            if name == "admin_address":
                fleet: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)
                await fleet.ListWorkers(fleet_pb2.ListWorkersRequest(), timeout=_ANSWER_S)
            else:
                health: Any = health_pb2_grpc.HealthStub(channel)
                await health.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            return bool(from_rpc_error(error).reason)  # a refusal of ours
    return True


async def _speaks_http(target: str) -> bool:
    host, _, port = target.rpartition(":")
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /v1/models HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while len(answer) < _MAX_ANSWER_BYTES and (piece := await reader.read(_MAX_ANSWER_BYTES)):
                answer += piece
            writer.close()
    except (OSError, TimeoutError):
        return False
    return answer.startswith(b"HTTP/1.1") and b'"error"' in answer


async def check_certificates(where: Surroundings) -> Sequence[Finding]:
    """The gateway's TLS files."""
    try:
        settings = GatewaySettings()
    except ValidationError:
        return []
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return []
    now = datetime.fromtimestamp(where.wall_clock(), UTC)
    try:
        found = read_certificates(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file, now)
    except CertificateError as error:
        fix = "put a sound pair there: TORCHRELAY_GATEWAY_TLS_CERT_FILE, _TLS_KEY_FILE, _TLS_CLIENT_CA_FILE"
        return [failure("certificates", str(error), fix)]
    left = found.not_after - now
    what = f"{settings.tls_cert_file} is valid for {left.days} more days"
    if left < _EXPIRES_SOON:
        return [warning("certificates", what, "renew it: a running gateway takes the new files without a restart")]
    return [ok("certificates", what)]


async def check_gateway(where: Surroundings) -> Sequence[Finding]:
    """The gateway that callers use, with the caller's key: readiness, credentials, scopes, and models with workers."""
    address = where.connection.address
    async with where.connection.aio_client() as client:
        bad = await _readiness(where.connection)
        if bad is not None:
            return [bad]
        found = [ok("gateway", f"the gateway at {address} is ready")]
        try:
            call = client.model.ListModels(model_pb2.ListModelsRequest(), metadata=client.metadata, timeout=_ANSWER_S)
            models = (await call).models
        except grpc.aio.AioRpcError as error:
            return [*found, _refused_key(from_rpc_error(error))]
        found.append(await _scopes(client))
        found += [_model(model) for model in models]
        if not models:
            what = "no model is registered"
            found.append(warning("models", what, "start a worker: `torchrelay worker --model DIRECTORY`"))
        return found


async def _readiness(connection: Connection) -> Finding | None:
    address = connection.address
    request = health_pb2.HealthCheckRequest(service="readiness")
    try:
        async with _open(address, connection.tls, insecure=connection.insecure) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(request, timeout=_ANSWER_S)
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return failure("gateway", f"no gateway answers at {address}", _START)
        return failure("gateway", f"what answers at {address} is no gateway ({error.code().name})", _START)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        what = f"the gateway at {address} is not ready: it has not reached the queue's server yet, or is stopping"
        return failure("gateway", what, "look at its log, and at what is said of the queue here")
    return None


def _open(address: str, tls: Tls | None, *, insecure: bool) -> grpc.aio.Channel:
    if insecure or (tls is None and is_loopback(address)):
        return grpc.aio.insecure_channel(address)
    return grpc.aio.secure_channel(address, (tls or Tls()).credentials())


def _refused_key(error: RelayError) -> Finding:
    if error.reason == "CREDENTIALS_MISSING":
        fix = "make a key with `torchrelay keys create TENANT`, and set TORCHRELAY_API_KEY or --api-key"
        return failure("key", "there is no API key to call with", fix)
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        fix = "set TORCHRELAY_API_KEY to one that `torchrelay keys list` shows as active, or make one"
        return failure("key", f"the gateway does not take this key: {error.message}", fix)
    return failure("key", f"the gateway refuses to list models: {error}", "look at the gateway's log")


async def _scopes(client: AsyncClient) -> Finding:
    """Which scopes a key has shows in what is refused for lack of one: these requests are wrong in another way."""
    asked: dict[Scope, Callable[[], Awaitable[Any]]] = {
        Scope.GENERATE: lambda: client.generation.GetGeneration(
            pb.GetGenerationRequest(generation_id="doctor"), metadata=client.metadata, timeout=_ANSWER_S
        ),
        Scope.TASKS: lambda: client.embedding.Embed(
            embedding_pb2.EmbedRequest(), metadata=client.metadata, timeout=_ANSWER_S
        ),
        Scope.BATCH: lambda: client.batch.ListBatches(
            batch_pb2.ListBatchesRequest(page_size=1), metadata=client.metadata, timeout=_ANSWER_S
        ),
    }
    allowed = [scope.value for scope, call in asked.items() if await _is_allowed(call)]
    if not allowed:
        fix = "make one that may: `torchrelay keys create TENANT --scope generate`"
        return failure("key", "the key works, but may neither generate nor run tasks or batches", fix)
    return ok("key", f"the key works; scopes: {', '.join(allowed)}")


async def _is_allowed(call: Callable[[], Awaitable[Any]]) -> bool:
    try:
        await call()
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason not in ("METHOD_NOT_ALLOWED", "CREDENTIALS_MISSING", "CREDENTIALS_INVALID")
    return True


def _model(model: model_pb2.Model) -> Finding:
    if model.num_workers:
        return ok("models", f"{model.name}: {model.num_workers} workers, {model.num_queued} requests wait")
    fix = f"start a worker: `torchrelay worker --model DIRECTORY --model-name {model.name}`"
    if model.num_queued:
        return failure("models", f"{model.name} has no worker, and {model.num_queued} requests wait for one", fix)
    return warning("models", f"{model.name} has no worker: requests would wait for one", fix)


async def check_operators(where: Surroundings) -> Sequence[Finding]:
    """The admin port, with the operator's key: whether it answers, and what this key may administer."""
    tls = where.connection.tls
    address = where.admin_address
    metadata = auth_metadata(where.admin_key)
    options: dict[str, Any] = {"metadata": metadata, "timeout": _ANSWER_S}
    async with _open(address, tls, insecure=where.connection.insecure) as channel:
        keys: Any = api_key_pb2_grpc.ApiKeyServiceStub(channel)
        tenants: Any = tenant_pb2_grpc.TenantServiceStub(channel)
        fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        usage: Any = usage_pb2_grpc.UsageServiceStub(channel)
        asked: dict[Scope, Callable[[], Awaitable[Any]]] = {
            Scope.ADMIN_FLEET: lambda: fleet.ListWorkers(fleet_pb2.ListWorkersRequest(), **options),
            Scope.ADMIN_KEYS: lambda: keys.ListApiKeys(api_key_pb2.ListApiKeysRequest(page_size=1), **options),
            Scope.ADMIN_TENANTS: lambda: tenants.ListTenants(tenant_pb2.ListTenantsRequest(page_size=1), **options),
            Scope.ADMIN_USAGE: lambda: usage.QueryUsage(usage_pb2.QueryUsageRequest(), **options),
        }
        try:
            await asked[Scope.ADMIN_FLEET]()
        except grpc.aio.AioRpcError as error:
            refusal = from_rpc_error(error)
            if not refusal.reason:
                fix = "name it with --admin-address or TORCHRELAY_ADMIN_ADDRESS; it is at loopback unless that is set"
                return [warning("operators", f"no admin port answers at {address}", fix)]
            if refusal.code is grpc.StatusCode.UNAUTHENTICATED:
                fix = "set TORCHRELAY_ADMIN_KEY; `torchrelay bootstrap` makes the first administrator's key"
                return [warning("operators", f"the admin port at {address} does not know you", fix)]
        allowed = [scope.value for scope, call in asked.items() if await _is_allowed(call)]
    if not allowed:
        fix = "use an administrator's key: TORCHRELAY_ADMIN_KEY"
        return [warning("operators", f"the admin port at {address} answers, but this key may nothing there", fix)]
    return [ok("operators", f"the admin port at {address} answers; you may: {', '.join(allowed)}")]

"""What keys and tenants may do and use, over a real gateway, queue and worker."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from common.grants import Caps, Quotas
from common.redis import connect, execute
from common.settings import RedisSettings
from tests.builders_calls import Outcome, Refusal, events_of, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system, until
from torchrelay.admin.v1beta1 import (
    api_key_pb2,
    api_key_pb2_grpc,
    grants_pb2,
    tenant_pb2,
    tenant_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

MODEL, OTHER = "tiny", "other"
CONTEXT = 256
PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
INVALID = grpc.StatusCode.INVALID_ARGUMENT
PROMPT = list(range(3, 43))  # 40 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=CONTEXT, eos_token_id=None
    )


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[System]:
    """Two gateways, of which the second does not tell of models, and a worker."""
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway()
        system.add_gateway(TORCHRELAY_GATEWAY_REVEAL_MODELS="false")
        system.add_worker(folder, MODEL)
        system.add_worker(folder, OTHER)
        asyncio.run(system.ready(MODEL, OTHER))
        yield system


@pytest.fixture
async def client(system: System) -> AsyncIterator[AsyncClient]:
    async with system.client(system.gateways[0]) as client:
        yield client


@pytest.fixture
async def admin(system: System) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(system.gateways[0].admin_address) as channel:
        yield channel


def request(**fields: Any) -> pb.StreamGenerateRequest:
    config = {"max_tokens": 4, **fields.pop("config", {})}
    good: dict[str, Any] = {"model": MODEL, "input": pb.GenerationInput(token_ids=pb.TokenIds(ids=PROMPT))}
    wanted = {name: value for name, value in config.items() if value is not None}
    return pb.StreamGenerateRequest(**{**good, "config": pb.GenerationConfig(**wanted), **fields})


def with_key(key: str) -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {key}")]}


async def run(client: AsyncClient, message: pb.StreamGenerateRequest, key: str) -> Outcome:
    return await Outcome(events_of(client.generation.StreamGenerate(message, **with_key(key)))).read()


async def refusal_of(client: AsyncClient, message: pb.StreamGenerateRequest, key: str) -> Refusal:
    with refused() as refusal:
        await run(client, message, key)
    return refusal


# -- rights


@pytest.mark.row(7)
async def test_a_key_serves_its_models_alone(system: System, client: AsyncClient) -> None:
    key = system.create_key("acme", models=(MODEL,))
    outcome = await run(client, request(), key)
    assert outcome.finished is not None
    denied = await refusal_of(client, request(model=OTHER), key)
    assert (denied.code, denied.reason) == (PERMISSION_DENIED, "MODEL_NOT_ALLOWED")
    unknown = await refusal_of(client, request(model="nothing"), system.create_key("acme"))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    listed = await client.model.ListModels(model_pb2.ListModelsRequest(), **with_key(key))
    assert [model.name for model in listed.models] == [OTHER, MODEL]
    # A generation of a model that this key of the same tenant may not use.
    foreign = await run(client, request(model=OTHER), system.create_key("acme"))
    for call in (
        lambda: client.generation.GetGeneration(
            pb.GetGenerationRequest(generation_id=foreign.generation_id), **with_key(key)
        ),
        lambda: client.generation.CancelGeneration(
            pb.CancelGenerationRequest(generation_id=foreign.generation_id), **with_key(key)
        ),
        lambda: client.generation.DeleteGeneration(
            pb.DeleteGenerationRequest(generation_id=foreign.generation_id), **with_key(key)
        ),
    ):
        with refused() as refusal:
            await call()
        assert refusal.reason == "REQUEST_NOT_FOUND"


@pytest.mark.row(9)
async def test_a_gateway_may_keep_quiet_about_models(system: System) -> None:
    key = system.create_key("acme", models=(MODEL,))
    async with system.client(system.gateways[1]) as client:
        assert (await run(client, request(), key)).finished is not None
        listed = await client.model.ListModels(model_pb2.ListModelsRequest(), **with_key(key))
        assert [model.name for model in listed.models] == [MODEL]
        denied = await refusal_of(client, request(model=OTHER), key)
        unknown = await refusal_of(client, request(model="nothing"), key)
        assert denied.summary == unknown.summary
        assert denied.reason == "MODEL_NOT_FOUND"
        for call in (client.model.GetModel, client.model.Tokenize):
            texts = set()
            for name in (OTHER, "nothing"):
                kind = model_pb2.GetModelRequest if call == client.model.GetModel else model_pb2.TokenizeRequest
                with refused() as refusal:
                    await call(kind(model=name), **with_key(key))  # type: ignore[arg-type,operator]
                texts.add(refusal.summary)
            assert len(texts) == 1


@pytest.mark.row(8)
async def test_a_key_without_the_scope_is_refused_before_its_message_is_read(
    system: System, client: AsyncClient
) -> None:
    key = system.create_key("acme", scopes=("tasks",))
    for message in (request(), request(model="")):
        denied = await refusal_of(client, message, key)
        assert (denied.code, denied.reason) == (PERMISSION_DENIED, "METHOD_NOT_ALLOWED")
    assert (await client.model.ListModels(model_pb2.ListModelsRequest(), **with_key(key))).models


@pytest.mark.row(23, 24)
async def test_priorities_are_rights(system: System, client: AsyncClient) -> None:
    key = system.create_key("acme")
    for priority in (pb.PRIORITY_UNSPECIFIED, pb.PRIORITY_NORMAL, pb.PRIORITY_LOW):
        assert (await run(client, request(priority=priority), key)).finished is not None
    denied = await refusal_of(client, request(priority=pb.PRIORITY_HIGH), key)
    assert (denied.code, denied.reason) == (PERMISSION_DENIED, "PRIORITY_NOT_ALLOWED")
    invalid = await refusal_of(client, request(priority=77), key)
    assert (invalid.code, invalid.reason, invalid.fields) == (INVALID, "FIELD_INVALID", ["priority"])
    urgent = system.create_key("acme", priorities=(0,))
    assert (await run(client, request(priority=pb.PRIORITY_HIGH), urgent)).finished is not None


@pytest.mark.row(16, 20)
async def test_caps_bound_one_request(system: System, client: AsyncClient) -> None:
    key = system.create_key(
        "acme", caps=Caps(max_tokens=6, max_outputs=2, max_context_tokens=44, max_disconnect_grace_ms=1000)
    )
    for config, reason, field in (
        ({"max_tokens": 7}, "FIELD_OUT_OF_RANGE", "config.max_tokens"),
        ({"max_length": 47, "max_tokens": None}, "FIELD_OUT_OF_RANGE", "config.max_length"),
        ({"max_tokens": 5}, "CONTEXT_LENGTH_EXCEEDED", "config.max_tokens"),
        ({"num_outputs": 3}, "FIELD_OUT_OF_RANGE", "config.num_outputs"),
    ):
        denied = await refusal_of(client, request(config=config), key)
        assert (denied.code, denied.reason, denied.fields) == (INVALID, reason, [field]), config
    free = await run(client, request(config={"max_tokens": None}), key)
    assert free.accepted is not None
    assert free.accepted.config.max_tokens == 4, "the context's rest, below the cap"
    accepted = await client.generation.SubmitGeneration(
        pb.SubmitGenerationRequest(model=MODEL, input=request().input), **with_key(key)
    )
    assert accepted.accepted.config.max_tokens == 4
    call = client.generation.StreamGenerate(request(disconnect_grace=Duration(seconds=500)), **with_key(key))
    assert (await Outcome(events_of(call)).read()).finished is not None, "a long grace is cut, not refused"


async def test_a_revoked_key_is_refused_by_every_gateway_within_five_seconds(
    system: System, admin: grpc.aio.Channel
) -> None:
    keys: api_key_pb2_grpc.ApiKeyServiceAsyncStub = api_key_pb2_grpc.ApiKeyServiceStub(admin)
    made = await keys.CreateApiKey(api_key_pb2.CreateApiKeyRequest(tenant="brief"))
    clients = [system.client(gateway) for gateway in system.gateways]

    async def works(client: AsyncClient) -> bool:
        try:
            await client.model.ListModels(model_pb2.ListModelsRequest(), **with_key(made.secret))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            return False
        return True

    assert all([await works(client) for client in clients])
    await keys.RevokeApiKey(api_key_pb2.RevokeApiKeyRequest(key_id=made.api_key.key_id))
    revoked = time.monotonic()
    await asyncio.sleep(5 - (time.monotonic() - revoked))
    assert not any([await works(client) for client in clients])
    for client in clients:
        await client.close()


# -- quotas


@pytest.mark.row(47)
async def test_a_rate_names_itself_and_the_time_to_wait(system: System, client: AsyncClient) -> None:
    key = system.create_key("rates", quotas=Quotas(requests_per_minute=2))
    for _ in range(2):
        await run(client, request(), key)
    call = client.generation.StreamGenerate(request(), **with_key(key))
    with pytest.raises(grpc.aio.AioRpcError) as limited:
        await Outcome(events_of(call)).read()
    trailers: dict[str, Any] = dict(limited.value.trailing_metadata())
    details = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
    info, retry, quota = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    assert [any(detail.Unpack(kind) for detail in details) for kind in (info, retry, quota)] == [True] * 3
    assert (limited.value.code(), info.reason) == (EXHAUSTED, "RATE_LIMITED")
    assert [violation.subject for violation in quota.violations] == ["key:requests_per_minute"]
    assert 0 < retry.retry_delay.ToMilliseconds() <= 30_000
    assert int(trailers["grpc-retry-pushback-ms"]) == retry.retry_delay.ToMilliseconds()


@pytest.mark.row(48)
async def test_tokens_that_were_not_used_come_back(system: System, client: AsyncClient) -> None:
    """A request reserves its prompt of 40 and its most tokens; what it used is less if it is cancelled."""
    key = system.create_key("refunds", quotas=Quotas(tokens_per_day=150))
    first = await run(client, request(config={"max_tokens": 4}), key)
    assert first.finished is not None
    refusal = await refusal_of(client, request(config={"max_tokens": 100}), key)
    assert (refusal.code, refusal.reason) == (EXHAUSTED, "QUOTA_EXCEEDED")
    assert refusal.error is not None
    assert refusal.error.retry_delay_s is None
    worker = system.workers[0]
    worker.signal(signal.SIGSTOP)  # it would be through with so few tokens before a slow machine has cancelled them
    try:
        submitted = await client.generation.SubmitGeneration(
            pb.SubmitGenerationRequest(model=MODEL, input=request().input, config=pb.GenerationConfig(max_tokens=66)),
            **with_key(key),
        )
        await client.generation.CancelGeneration(
            pb.CancelGenerationRequest(generation_id=submitted.accepted.generation_id), **with_key(key)
        )
    finally:
        worker.signal(signal.SIGCONT)

    async def is_given_back() -> bool:
        try:
            again = await run(client, request(config={"max_tokens": 20}), key)
        except grpc.aio.AioRpcError:
            return False
        return again.finished is not None

    await until(is_given_back, 10, "the rest of the cancelled one's reservation")


@pytest.mark.row(38)
async def test_a_request_that_is_not_queued_costs_nothing_and_a_repeat_neither(
    system: System, client: AsyncClient
) -> None:
    key = system.create_key("repeats", quotas=Quotas(requests_per_minute=2))
    message = request(idempotency_key="once")
    first = await run(client, message, key)
    for _ in range(5):
        assert (await run(client, message, key)).generation_id == first.generation_id
    reused = await refusal_of(client, request(idempotency_key="once", config={"max_tokens": 3}), key)
    assert reused.reason == "IDEMPOTENCY_KEY_REUSED"
    await run(client, request(), key)
    assert (await refusal_of(client, request(), key)).reason == "RATE_LIMITED"


@pytest.mark.row(49)
async def test_what_never_fits_a_quota_is_refused_for_good(system: System, client: AsyncClient) -> None:
    key = system.create_key("small", quotas=Quotas(tokens_per_minute=43))
    refusal = await refusal_of(client, request(), key)
    assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, "REQUEST_TOO_LARGE", ["config.max_tokens"])
    assert (await run(client, request(config={"max_tokens": 3}), key)).finished is not None


async def test_a_tenants_record_holds_for_all_its_keys(
    system: System, client: AsyncClient, admin: grpc.aio.Channel
) -> None:
    tenants: tenant_pb2_grpc.TenantServiceAsyncStub = tenant_pb2_grpc.TenantServiceStub(admin)
    record = tenant_pb2.Tenant(tenant="shared", weight=2.5, quotas=grants_pb2.Quotas(requests_per_minute=2))
    stored = await tenants.SetTenant(tenant_pb2.SetTenantRequest(tenant=record))
    assert (stored.tenant.weight, stored.tenant.quotas.requests_per_minute) == (2.5, 2)
    one, two = system.create_key("shared"), system.create_key("shared")
    await run(client, request(), one)
    await run(client, request(), two)
    refusal = await refusal_of(client, request(), one)
    assert refusal.reason == "RATE_LIMITED"
    assert refusal.error is not None
    assert refusal.error.metadata["subject"] == "tenant:requests_per_minute"


async def test_usage_is_counted_once_by_whatever_it_is_asked(
    system: System, client: AsyncClient, admin: grpc.aio.Channel
) -> None:
    service: usage_pb2_grpc.UsageServiceAsyncStub = usage_pb2_grpc.UsageServiceStub(admin)
    key, other = system.create_key("counted"), system.create_key("counted")
    message = request(idempotency_key="k", config={"max_tokens": 5})
    for _ in range(3):
        await run(client, message, key)
    await run(client, request(model=OTHER), other)

    async def ask(*group_by: Any, **fields: str) -> list[Any]:
        asked = usage_pb2.QueryUsageRequest(**{"tenant": "counted", **fields}, group_by=group_by)  # type: ignore[arg-type]
        rows = (await service.QueryUsage(asked)).rows
        return [(row.model, row.key_id, row.generations, row.prompt_tokens, row.completion_tokens) for row in rows]

    key_id, other_id = key.split("_")[1], other.split("_")[1]
    assert await ask() == [("", "", 2, 80, 9)]
    assert await ask(usage_pb2.USAGE_DIMENSION_MODEL) == [(OTHER, "", 1, 40, 4), (MODEL, "", 1, 40, 5)]
    assert await ask(usage_pb2.USAGE_DIMENSION_KEY, key_id=key_id) == [("", key_id, 1, 40, 5)]
    assert await ask(usage_pb2.USAGE_DIMENSION_KEY, model=OTHER) == [("", other_id, 1, 40, 4)]
    assert await ask(tenant="nobody") == []


# -- two gateways race for one key's quota


async def test_racing_gateways_grant_no_more_than_the_quota_and_all_of_it(system: System) -> None:
    """44 tokens a request, all of them used. The minute's worth that may come at once is gone; 25 drain a second."""
    rate = 25  # far below what two gateways serve, also beside other tests
    key = system.create_key("racing", quotas=Quotas(tokens_per_minute=44 * rate * 60))
    redis = connect(RedisSettings(url=system.server.url))
    seconds, micros = await execute(redis, "TIME")
    began = int(seconds) + int(micros) / 1e6
    await execute(redis, "HSET", "{t:racing}:quota", f"t:{key.split('_')[1]}", f"{(began + 60) * 1000:.3f}")
    submit = pb.SubmitGenerationRequest(
        model=MODEL, input=request().input, config=pb.GenerationConfig(max_tokens=4), priority=pb.PRIORITY_LOW
    )
    ends = time.monotonic() + 6
    admitted = 0

    async def ask(client: AsyncClient) -> None:
        nonlocal admitted
        while time.monotonic() < ends:
            try:
                await client.generation.SubmitGeneration(submit, **with_key(key))
                admitted += 1
            except grpc.aio.AioRpcError as error:
                if error.code() is not EXHAUSTED:
                    raise
                await asyncio.sleep(0.01)

    clients = [system.client(gateway) for gateway in system.gateways]
    await asyncio.gather(*(ask(client) for client in clients for _ in range(3)))
    seconds, micros = await execute(redis, "TIME")
    drained = (int(seconds) + int(micros) / 1e6 - began) * rate
    assert 0.95 * drained <= admitted <= drained + 1, (admitted, drained)
    for client in clients:
        await client.close()
    await redis.aclose()

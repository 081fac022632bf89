"""No call tells one tenant anything of another: not by its answer, and not by what it shares in the prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest

from common import keys
from tests.builders_calls import Outcome, events_of, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import System, gateway_and_worker, until
from torchrelay.admin.v1beta1 import tenant_pb2, tenant_pb2_grpc
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import generation_pb2_grpc as pb_grpc

MODEL = "tiny"
PROMPT = [3 + (5 * i) % 250 for i in range(70)]  # more than four blocks
UNTOUCHED = (  # whatever a busy machine makes of it
    pb.GENERATION_STATE_QUEUED,
    pb.GENERATION_STATE_RUNNING,
    pb.GENERATION_STATE_RECOVERING,
    pb.GENERATION_STATE_FINISHED,
)
Call: TypeAlias = Callable[[AsyncClient, str, dict[str, Any]], Awaitable[Any]]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)
    with gateway_and_worker(tmp_path_factory.mktemp("system"), folder, MODEL) as system:
        yield system


@pytest.fixture
async def client(system: System) -> AsyncIterator[AsyncClient]:
    async with system.client() as client:
        yield client


def as_tenant(system: System, tenant: str) -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {system.create_key(tenant)}")]}


def wanted(ids: list[int] = PROMPT, max_tokens: int = 3, **fields: Any) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(
        model=MODEL,
        input=pb.GenerationInput(token_ids=pb.TokenIds(ids=ids)),
        config=pb.GenerationConfig(max_tokens=max_tokens),
        **fields,
    )


async def resume(client: AsyncClient, generation_id: str, options: dict[str, Any]) -> Any:
    request = pb.ResumeGenerationRequest(generation_id=generation_id)
    return await Outcome(events_of(client.generation.ResumeGeneration(request, **options))).read()


async def resume_behind_an_event(client: AsyncClient, generation_id: str, options: dict[str, Any]) -> Any:
    request = pb.ResumeGenerationRequest(generation_id=generation_id, after_sequence=2, chain_hash=b"12345678")
    return await Outcome(events_of(client.generation.ResumeGeneration(request, **options))).read()


async def get(client: AsyncClient, generation_id: str, options: dict[str, Any]) -> Any:
    return await client.generation.GetGeneration(pb.GetGenerationRequest(generation_id=generation_id), **options)


async def cancel(client: AsyncClient, generation_id: str, options: dict[str, Any]) -> Any:
    return await client.generation.CancelGeneration(pb.CancelGenerationRequest(generation_id=generation_id), **options)


async def delete(client: AsyncClient, generation_id: str, options: dict[str, Any]) -> Any:
    return await client.generation.DeleteGeneration(pb.DeleteGenerationRequest(generation_id=generation_id), **options)


CALLS: dict[str, Call] = {
    "ResumeGeneration": resume,
    "ResumeGeneration behind an event": resume_behind_an_event,
    "GetGeneration": get,
    "CancelGeneration": cancel,
    "DeleteGeneration": delete,
}


def test_every_method_that_takes_an_id_is_called() -> None:
    methods = pb.DESCRIPTOR.services_by_name["GenerationService"].methods
    taking = {method.name for method in methods if "generation_id" in method.input_type.fields_by_name}
    assert taking == {name.partition(" ")[0] for name in CALLS}
    assert pb_grpc.GenerationServiceServicer


@pytest.mark.parametrize("name", CALLS)
async def test_a_foreign_generation_reads_like_one_that_never_was(
    name: str, system: System, client: AsyncClient
) -> None:
    owner, stranger = as_tenant(system, "owner"), as_tenant(system, "stranger")
    done = (await Outcome(events_of(client.generation.StreamGenerate(wanted(), **owner))).read()).generation_id
    running = (
        await client.generation.SubmitGeneration(
            pb.SubmitGenerationRequest(model=MODEL, input=wanted().input, config=pb.GenerationConfig(max_tokens=1500)),
            **owner,
        )
    ).accepted.generation_id
    answers = set()
    for generation_id in (
        keys.new_generation_id(keys.shard_of(done)),  # none of this model
        keys.new_generation_id("another-model-0123456789abcdef"),
        "what nobody ever issued",
        done,
        running,
    ):
        with refused() as refusal:
            await CALLS[name](client, generation_id, stranger)
        answers.add((*refusal.summary, str(refusal.error.metadata) if refusal.error else ""))
    assert len(answers) == 1
    assert answers.pop()[:2] == (grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")
    for generation_id in (done, running):  # and nothing was done to it
        generation = (await get(client, generation_id, owner)).generation
        assert generation.state in UNTOUCHED
    await cancel(client, running, owner)


async def test_an_idempotency_key_of_another_tenant_is_another_key(system: System, client: AsyncClient) -> None:
    ids = set()
    for tenant in ("one", "two"):
        call = client.generation.StreamGenerate(wanted(idempotency_key="the-same"), **as_tenant(system, tenant))
        outcome = await Outcome(events_of(call)).read()
        assert outcome.accepted is not None
        assert not outcome.accepted.replayed
        ids.add(outcome.generation_id)
    assert len(ids) == 2


async def test_erased_is_as_if_it_never_was(system: System, client: AsyncClient) -> None:
    owner = as_tenant(system, "owner")
    call = client.generation.StreamGenerate(wanted(idempotency_key="erased"), **owner)
    erased = (await Outcome(events_of(call)).read()).generation_id
    await delete(client, erased, owner)
    for ask in CALLS.values():
        with refused() as refusal:
            await ask(client, erased, owner)
        assert refusal.reason == "REQUEST_NOT_FOUND"
    again = client.generation.StreamGenerate(wanted(idempotency_key="erased"), **owner)
    assert (await Outcome(events_of(again)).read()).generation_id != erased


async def test_erasing_a_running_generation_ends_its_stream(system: System, client: AsyncClient) -> None:
    owner = as_tenant(system, "owner")
    outcome = Outcome(events_of(client.generation.StreamGenerate(wanted(max_tokens=1900), **owner)))
    reading = asyncio.create_task(outcome.read())

    async def has_begun() -> bool:
        return len(outcome.token_ids) > 2

    await until(has_begun)
    await delete(client, outcome.generation_id, owner)
    async with asyncio.timeout(10):
        with refused() as refusal:
            await reading
    assert refusal.summary[:2] == (grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")
    assert len(outcome.token_ids) < 1900


# -- prefix cache


async def cached(client: AsyncClient, options: dict[str, Any], ids: list[int], **fields: Any) -> int:
    outcome = await Outcome(events_of(client.generation.StreamGenerate(wanted(ids, **fields), **options))).read()
    assert outcome.finished is not None
    return outcome.finished.usage.cached_prompt_tokens


async def test_a_prompt_is_found_in_the_cache_by_its_own_tenant_alone(system: System, client: AsyncClient) -> None:
    first, second = as_tenant(system, "first"), as_tenant(system, "second")
    ids = [7, *PROMPT]
    assert await cached(client, first, ids) == 0
    assert await cached(client, first, ids) > 0
    assert await cached(client, as_tenant(system, "first"), ids) > 0, "another key of the tenant"
    assert await cached(client, second, ids) == 0
    assert await cached(client, second, ids) > 0


@pytest.mark.row(56)
async def test_a_salt_keeps_apart_and_never_brings_together(system: System, client: AsyncClient) -> None:
    first, second = as_tenant(system, "first"), as_tenant(system, "second")
    ids = [8, *PROMPT]
    assert await cached(client, first, ids, cache_salt=b"a") == 0
    assert await cached(client, first, ids, cache_salt=b"a") > 0
    assert await cached(client, first, ids, cache_salt=b"b") == 0
    assert await cached(client, first, ids) == 0
    for salt in (b"a", b"first", b"\0tenant:first", b"tenant:first\0a"):
        assert await cached(client, second, ids, cache_salt=salt) == 0, salt


async def test_tenants_of_one_trust_group_share(system: System, client: AsyncClient) -> None:
    async with grpc.aio.insecure_channel(system.gateways[0].admin_address) as channel:
        tenants: tenant_pb2_grpc.TenantServiceAsyncStub = tenant_pb2_grpc.TenantServiceStub(channel)
        for name, group in (("left", "house"), ("right", "house"), ("house", "")):
            record = tenant_pb2.Tenant(tenant=name, trust_group=group)
            await tenants.SetTenant(tenant_pb2.SetTenantRequest(tenant=record))
    ids = [9, *PROMPT]
    assert await cached(client, as_tenant(system, "left"), ids) == 0
    assert await cached(client, as_tenant(system, "right"), ids) > 0
    assert await cached(client, as_tenant(system, "house"), ids) == 0, "a tenant named as the group is not in it"

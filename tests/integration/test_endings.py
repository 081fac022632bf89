"""How generations end before their time, seen by callers; repeated, submitted and unary calls; usage."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from common.redis import connect, execute
from common.settings import RedisSettings
from tests.builders_calls import Outcome, ended, events_of, idle_fleet, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system, until
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
COLD = "cold"
PROMPT = [3 + (7 * i) % 250 for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[System]:
    """Two gateways, a worker that nobody kills, and a model whose worker has gone."""
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway()
        system.add_gateway()
        system.add_worker(folder, MODEL)
        cold = system.add_worker(folder, COLD)
        asyncio.run(system.ready(MODEL, COLD))
        cold.stop()
        yield system


@pytest.fixture(scope="module")
def metered_key(system: System) -> str:
    """The key of a tenant of its own."""
    return system.create_key("metered")


@pytest.fixture
async def client(system: System) -> AsyncIterator[AsyncClient]:
    """A client of the first gateway, once the model is served."""
    await system.ready(MODEL)
    async with system.client(system.gateways[0]) as client:
        yield client


def seconds(value: float) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(int(value * 1000))
    return duration


def stream_request(max_tokens: int = 1500, **fields: Any) -> pb.StreamGenerateRequest:
    """A request of a bare stub: no disconnect grace, no idempotency key."""
    return pb.StreamGenerateRequest(
        model=fields.pop("model", MODEL),
        input=pb.GenerationInput(token_ids=pb.TokenIds(ids=fields.pop("prompt", PROMPT))),
        config=pb.GenerationConfig(max_tokens=max_tokens, seed=3, temperature=1.0, **fields.pop("config", {})),
        **fields,
    )


def has_tokens(outcome: Outcome) -> bool:
    return len(outcome.token_ids) >= 5


def finish_reasons(generation: pb.Generation) -> list[int]:
    return [output.end.finish_reason for output in generation.outputs]


@pytest.mark.row(43, 44)
async def test_cancel_ends_the_stream_well_and_frees_the_blocks(system: System, client: AsyncClient) -> None:
    outcome = Outcome(client.stream(PROMPT, model=MODEL, max_tokens=1500, seed=3, temperature=1.0))
    reading = asyncio.create_task(outcome.read())

    async def has_begun() -> bool:
        return has_tokens(outcome)

    await until(has_begun, what="tokens")
    assert await client.cancel(outcome.generation_id) == pb.GENERATION_STATE_CANCELLED
    await asyncio.wait_for(reading, 10)
    assert outcome.finished is not None
    assert outcome.output.finish_reason == pb.FINISH_REASON_CANCELLED
    assert outcome.finished.usage.completion_tokens == len(outcome.token_ids) > 0
    assert await client.cancel(outcome.generation_id) == pb.GENERATION_STATE_CANCELLED, "twice is once"
    await idle_fleet(system)
    # Resuming it is OK too, from the beginning or after any event.
    again = await Outcome.resumed(client.resume(outcome.generation_id)).read()
    assert again.token_ids == outcome.token_ids
    assert again.output.text == outcome.output.text
    assert again.output.finish_reason == pb.FINISH_REASON_CANCELLED
    rest = client.resume(outcome.generation_id, outcome.sequence, outcome.chain_hash)
    tail = await Outcome.resumed(rest, earlier=outcome).read()
    assert tail.token_ids == outcome.token_ids
    assert tail.output.finish_reason == pb.FINISH_REASON_CANCELLED


async def test_cancel_after_the_end_changes_nothing(client: AsyncClient) -> None:
    outcome = await Outcome(client.stream(PROMPT, model=MODEL, max_tokens=4)).read()
    assert await client.cancel(outcome.generation_id) == pb.GENERATION_STATE_FINISHED
    assert finish_reasons(await client.get(outcome.generation_id)) == [pb.FINISH_REASON_LENGTH]


async def test_call_that_is_cancelled_ends_its_generation(system: System, client: AsyncClient) -> None:
    call = client.generation.StreamGenerate(stream_request(), metadata=client.metadata)
    outcome = await Outcome(events_of(call)).read(until=has_tokens)
    generation = await ended(client, outcome.generation_id)
    assert generation.state == pb.GENERATION_STATE_CANCELLED
    assert finish_reasons(generation) == [pb.FINISH_REASON_CANCELLED]
    assert generation.usage.completion_tokens == len(generation.outputs[0].token_ids) < 1500
    await idle_fleet(system)


@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
async def test_call_deadline_ends_its_generation(system: System, client: AsyncClient, unary: bool) -> None:
    with refused() as refusal:
        if unary:
            request = pb.GenerateRequest()
            request.MergeFromString(stream_request().SerializeToString())
            call: Any = client.generation.Generate(request, metadata=client.metadata, timeout=0.4)
            await call
        else:
            call = client.generation.StreamGenerate(stream_request(), metadata=client.metadata, timeout=0.4)
            async for _ in call:
                pass
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    generation_id = dict(await call.initial_metadata())["torchrelay-generation-id"]
    generation = await ended(client, generation_id)
    # The queue's own deadline and the call's end come at the same moment: whichever is first ends it.
    assert generation.state in (pb.GENERATION_STATE_CANCELLED, pb.GENERATION_STATE_FINISHED)
    assert finish_reasons(generation)[0] in (pb.FINISH_REASON_CANCELLED, pb.FINISH_REASON_TIME_LIMIT)
    assert 0 < len(generation.outputs[0].token_ids) < 1500
    await idle_fleet(system)


async def test_closed_channel_ends_the_generations_of_its_calls(system: System, client: AsyncClient) -> None:
    async with system.client(system.gateways[0]) as leaving:
        call = leaving.generation.StreamGenerate(stream_request(), metadata=leaving.metadata)
        events = events_of(call)
        accepted = (await anext(events)).accepted
    generation = await ended(client, accepted.generation_id)
    assert generation.state == pb.GENERATION_STATE_CANCELLED
    await idle_fleet(system)


async def test_killed_client_without_grace_ends_its_generation(system: System, client: AsyncClient) -> None:
    program = textwrap.dedent(
        """
        import sys, grpc
        from torchrelay.v1 import generation_pb2 as pb, generation_pb2_grpc
        address, key, path = sys.argv[1:]
        request = pb.StreamGenerateRequest.FromString(open(path, "rb").read())
        stub = generation_pb2_grpc.GenerationServiceStub(grpc.insecure_channel(address))
        for response in stub.StreamGenerate(request, metadata=[("authorization", "Bearer " + key)]):
            if response.event.HasField("accepted"):
                print(response.event.accepted.generation_id, flush=True)
        """
    )
    path = system.folder / "request"
    path.write_bytes(stream_request(prompt=PROMPT * 10).SerializeToString())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, system.gateways[0].address, system.key, str(path), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    generation_id = (await process.stdout.readline()).decode().strip()
    assert generation_id
    process.kill()
    await process.wait()
    generation = await ended(client, generation_id)
    assert generation.state == pb.GENERATION_STATE_CANCELLED
    assert generation.usage.completion_tokens < 1500
    await idle_fleet(system)


async def test_grace_lets_a_generation_run_on_and_be_resumed_elsewhere(system: System, client: AsyncClient) -> None:
    request = stream_request(600, disconnect_grace=seconds(20))
    call = client.generation.StreamGenerate(request, metadata=client.metadata)
    outcome = await Outcome(events_of(call)).read(until=has_tokens)
    whole = await ended(client, outcome.generation_id)
    assert whole.state == pb.GENERATION_STATE_FINISHED
    async with system.client(system.gateways[1]) as other:
        stream = other.resume(outcome.generation_id, outcome.sequence, outcome.chain_hash)
        rest = await Outcome.resumed(stream, earlier=outcome).read()
    assert rest.token_ids == list(whole.outputs[0].token_ids)
    assert rest.output.text == whole.outputs[0].text


async def test_grace_that_passes_ends_the_generation(system: System, client: AsyncClient) -> None:
    request = stream_request(disconnect_grace=seconds(0.2), config={"num_outputs": 4})
    call = client.generation.StreamGenerate(request, metadata=client.metadata)
    outcome = await Outcome(events_of(call)).read(until=lambda outcome: bool(outcome.outputs))
    generation = await ended(client, outcome.generation_id)
    assert generation.state in (pb.GENERATION_STATE_CANCELLED, pb.GENERATION_STATE_FINISHED)
    assert generation.state == pb.GENERATION_STATE_CANCELLED, "1500 tokens of 4 outputs take longer than the grace"
    await idle_fleet(system)


async def test_time_limit_ends_well_with_the_partial_text(system: System, client: AsyncClient) -> None:
    outcome = await Outcome(client.stream(PROMPT, model=MODEL, max_tokens=1500, num_outputs=2, time_limit_s=0.5)).read()
    assert outcome.finished is not None
    assert {output.finish_reason for output in outcome.outputs} == {pb.FINISH_REASON_TIME_LIMIT}
    assert all(output.token_ids and output.text for output in outcome.outputs)
    assert outcome.finished.timings.total_time.ToMilliseconds() >= 500
    assert outcome.finished.usage.completion_tokens == sum(len(output.token_ids) for output in outcome.outputs)
    whole = await client.get(outcome.generation_id)
    assert whole.state == pb.GENERATION_STATE_FINISHED
    assert [output.text for output in whole.outputs] == [output.text for output in outcome.outputs]
    await idle_fleet(system)


# -- repeated, submitted, unary ---------------------------------------------------------------------------------------


async def test_repeat_with_the_same_key_replays_the_same_generation(client: AsyncClient) -> None:
    request = stream_request(30, idempotency_key="order-17")
    first = await Outcome(events_of(client.generation.StreamGenerate(request, metadata=client.metadata))).read()
    second = await Outcome(events_of(client.generation.StreamGenerate(request, metadata=client.metadata))).read()
    assert first.accepted is not None
    assert second.accepted is not None
    assert not first.accepted.replayed
    assert second.accepted.replayed
    assert second.generation_id == first.generation_id
    assert second.token_ids == first.token_ids
    assert second.output.text == first.output.text
    assert second.finished == first.finished
    other = stream_request(31, idempotency_key="order-17")
    with refused() as refusal:
        await Outcome(events_of(client.generation.StreamGenerate(other, metadata=client.metadata))).read()
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason == "IDEMPOTENCY_KEY_REUSED"


async def test_two_gateways_asked_at_once_make_one_generation(system: System, client: AsyncClient) -> None:
    async with system.client(system.gateways[1]) as other:
        for number in range(5):
            request = pb.SubmitGenerationRequest(model=MODEL, idempotency_key=f"twice-{number}")
            request.input.token_ids.ids.extend(PROMPT)
            request.config.max_tokens = 8
            responses = await asyncio.gather(
                *(each.generation.SubmitGeneration(request, metadata=each.metadata) for each in (client, other) * 2)
            )
            assert len({response.accepted.generation_id for response in responses}) == 1
            assert sorted(response.accepted.replayed for response in responses) == [False, True, True, True]
            first, second = await asyncio.gather(
                *(ended(each, responses[0].accepted.generation_id) for each in (client, other))
            )
            assert first == second


async def test_submitted_generation_is_resumed_and_read_later(system: System, client: AsyncClient) -> None:
    request = pb.SubmitGenerationRequest()
    request.MergeFromString(stream_request(50).SerializeToString())
    accepted = (await client.generation.SubmitGeneration(request, metadata=client.metadata)).accepted
    assert accepted.prompt_tokens == len(PROMPT)
    async with system.client(system.gateways[1]) as other:
        outcome = await Outcome.resumed(other.resume(accepted.generation_id)).read()
        whole = await other.get(accepted.generation_id)
    assert len(outcome.token_ids) == 50
    assert list(whole.outputs[0].token_ids) == outcome.token_ids
    assert whole.outputs[0].text == outcome.output.text
    assert whole.last_sequence == outcome.sequence
    assert whole.chain_hash == outcome.chain_hash
    assert outcome.finished is not None
    assert whole.timings == outcome.finished.timings


async def test_unary_call_returns_the_whole_generation(client: AsyncClient) -> None:
    request = pb.GenerateRequest()
    request.MergeFromString(stream_request(40).SerializeToString())
    generation = (await client.generation.Generate(request, metadata=client.metadata)).generation
    streamed = await Outcome(client.stream(PROMPT, model=MODEL, max_tokens=40, seed=3, temperature=1.0)).read()
    assert generation.state == pb.GENERATION_STATE_FINISHED
    assert list(generation.outputs[0].token_ids) == streamed.token_ids
    assert generation.outputs[0].text == streamed.output.text
    assert generation.usage.completion_tokens == len(streamed.token_ids)


async def test_unary_call_tells_its_id_while_it_waits(system: System, client: AsyncClient) -> None:
    request = pb.GenerateRequest()
    request.MergeFromString(stream_request(model=COLD).SerializeToString())
    async with grpc.aio.insecure_channel(system.gateways[0].address) as channel:
        # As a stream of one message: stubs of unary calls show the initial metadata with the result.
        method = channel.unary_stream(
            "/torchrelay.v1.GenerationService/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        call: Any = method(request, metadata=client.metadata, timeout=20)
        generation_id = dict(await call.initial_metadata())["torchrelay-generation-id"]
        assert not call.done()
        await client.cancel(generation_id)
        (response,) = [response async for response in call]
    assert response.generation.generation_id == generation_id
    assert response.generation.state == pb.GENERATION_STATE_CANCELLED
    assert finish_reasons(response.generation) == [pb.FINISH_REASON_CANCELLED]


# -- usage, and no worker ---------------------------------------------------------------------------------------------


async def used(system: System, tenant: str) -> dict[str, int]:
    """What was counted for a tenant in all hours and shards, by kind."""
    redis = connect(RedisSettings(url=system.server.url))
    counted: dict[str, int] = {}
    try:
        async for name in redis.scan_iter(match="{*}:usage:*"):
            for owner, amount in (await execute(redis, "HGETALL", name)).items():
                kind, _, of = owner.decode().split(":")
                if of == tenant:
                    counted[kind] = counted.get(kind, 0) + int(amount)
    finally:
        await redis.aclose()
    return counted


async def test_usage_is_counted_once_however_a_generation_ended(system: System, metered_key: str) -> None:
    await system.ready(MODEL)
    async with system.client(system.gateways[0], key=metered_key) as metered:
        generations = [await metered.generate(PROMPT, model=MODEL, max_tokens=5)]
        options: dict[str, Any] = {"model": MODEL, "seed": 3, "temperature": 1.0, "max_tokens": 1500}
        cancelled = await Outcome(metered.stream(PROMPT, **options)).read(until=has_tokens)
        await asyncio.gather(*(metered.cancel(cancelled.generation_id) for _ in range(3)))
        generations.append(await ended(metered, cancelled.generation_id))
        limited = await Outcome(metered.stream(PROMPT, **options, time_limit_s=0.3)).read()
        generations.append(await ended(metered, limited.generation_id))
        gone = metered.generation.StreamGenerate(stream_request(), metadata=metered.metadata)
        left = await Outcome(events_of(gone)).read(until=has_tokens)
        generations.append(await ended(metered, left.generation_id))
        repeats = [await metered.generate(PROMPT, model=MODEL, max_tokens=7, idempotency_key="k") for _ in range(3)]
        assert len({repeat.generation_id for repeat in repeats}) == 1
        generations.append(repeats[0])
        await Outcome.resumed(metered.resume(generations[0].generation_id)).read()
        never_started = await metered.generation.SubmitGeneration(
            pb.SubmitGenerationRequest(model=COLD, input=pb.GenerationInput(text="hello")), metadata=metered.metadata
        )
        await metered.cancel(never_started.accepted.generation_id)
    assert [generation.usage.prompt_tokens for generation in generations] == [len(PROMPT)] * 5
    assert await used(system, "metered") == {
        "generations": 6,
        "prompt_tokens": 5 * len(PROMPT),
        "cached_prompt_tokens": sum(generation.usage.cached_prompt_tokens for generation in generations),
        "completion_tokens": sum(generation.usage.completion_tokens for generation in generations),
    }


@pytest.mark.row(37, 50)
async def test_time_limit_that_passes_in_the_queue_is_an_error(client: AsyncClient) -> None:
    request = stream_request(model=COLD, time_limit=seconds(0.5), idempotency_key="too-late")
    with refused() as refusal:
        await Outcome(events_of(client.generation.StreamGenerate(request, metadata=client.metadata))).read()
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert refusal.reason == "QUEUE_DEADLINE"
    repeat = pb.SubmitGenerationRequest(model=COLD, input=request.input, config=request.config)
    repeat.idempotency_key = "too-late"
    accepted = (await client.generation.SubmitGeneration(repeat, metadata=client.metadata)).accepted
    assert accepted.replayed
    generation = await client.get(accepted.generation_id)
    assert generation.state == pb.GENERATION_STATE_EXPIRED
    assert generation.error_reason == "QUEUE_DEADLINE"
    assert generation.usage == pb.Usage()
    assert not generation.outputs[0].HasField("end")
    with refused() as refusal:
        await Outcome.resumed(client.resume(accepted.generation_id)).read()
    assert refusal.reason == "QUEUE_DEADLINE"


async def test_queued_generation_shows_its_place_and_can_be_cancelled(client: AsyncClient) -> None:
    outcomes = [Outcome(client.stream(PROMPT, model=COLD, max_tokens=5)) for _ in range(2)]
    readings = []
    for outcome in outcomes:
        readings.append(asyncio.create_task(outcome.read()))

        async def is_accepted(outcome: Outcome = outcome) -> bool:
            return bool(outcome.generation_id)

        await until(is_accepted, what="Accepted")
    assert [outcome.accepted.place for outcome in outcomes if outcome.accepted] == [0, 1]
    for outcome, reading in zip(outcomes, readings, strict=True):
        assert (await client.get(outcome.generation_id)).state == pb.GENERATION_STATE_QUEUED
        assert await client.cancel(outcome.generation_id) == pb.GENERATION_STATE_CANCELLED
        await asyncio.wait_for(reading, 10)
        assert outcome.token_ids == []
        assert outcome.output.finish_reason == pb.FINISH_REASON_CANCELLED
        assert outcome.finished is not None
        assert outcome.finished.usage == pb.Usage()


async def test_caller_that_leaves_the_queue_leaves_nothing_behind(client: AsyncClient) -> None:
    call = client.generation.StreamGenerate(stream_request(model=COLD), metadata=client.metadata)
    outcome = await Outcome(events_of(call)).read(until=lambda outcome: bool(outcome.outputs))
    assert (await ended(client, outcome.generation_id)).state == pb.GENERATION_STATE_CANCELLED
    models = {model.name: model for model in await client.models()}
    assert models[COLD].num_queued == 0

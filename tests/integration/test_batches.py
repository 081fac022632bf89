"""Batches over a real gateway, queue and worker: made, fed, read, cancelled, erased, and carried through kills."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from common.api_keys import ApiKeys
from common.grants import Quotas
from common.keys import random_id
from common.redis import connect
from common.settings import RedisSettings
from tests.builders_batches import (
    MODEL,
    begun,
    command,
    create_raw,
    feeds,
    header,
    item,
    live_tenants,
    num_generations,
    part,
    prompt,
    read,
    stored_items,
    summary,
    superuser_call,
    tenant_client,
)
from tests.builders_calls import idle_fleet, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system, until
from tests.builders_tasks import CORPUS, write_encoder
from torchrelay.client import AsyncClient
from torchrelay.v1 import batch_pb2 as pb
from torchrelay.v1 import classification_pb2 as cpb
from torchrelay.v1 import embedding_pb2 as epb
from torchrelay.v1 import generation_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=512, eos_token_id=None)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[System]:
    """Two gateways with small bounds and short leases, and a worker."""
    bounds = {
        "TORCHRELAY_QUEUE_GATEWAY_LEASE_MS": "2000",
        "TORCHRELAY_GATEWAY_MAX_BATCH_ITEMS": "300",
        "TORCHRELAY_GATEWAY_MAX_BATCH_BYTES": "60000",
        "TORCHRELAY_GATEWAY_MAX_BATCHES_PER_TENANT": "20",
        "TORCHRELAY_GATEWAY_BATCH_WINDOW": "16",
        "TORCHRELAY_GATEWAY_PROGRESS_INTERVAL_S": "0.3",
    }
    with running_system(tmp_path_factory.mktemp("system"), **bounds) as system:
        system.add_gateway()
        system.add_gateway()
        system.add_worker(folder, MODEL)
        asyncio.run(system.ready(MODEL))
        yield system


@pytest.fixture
async def client(system: System, folder: Path) -> AsyncIterator[AsyncClient]:
    """A client of a tenant of its own, of both gateways."""
    await system.scale(folder, gateways=2)
    async with system.client(key=system.create_key(f"tenant-{random_id()}")) as client:
        yield client


async def test_every_item_has_its_own_result_and_the_batch_says_so(client: AsyncClient) -> None:
    made = await client.create_batch([item(index, custom_id=f"line-{index}") for index in range(40)])
    assert made.counts.total == 40
    results = await read(client, made.batch_id)
    assert [result.index for result in results] == list(range(1, 41))
    assert sorted(result.item_index for result in results) == list(range(40))
    for result in results:
        assert result.custom_id == f"line-{result.item_index}"
        generation = result.generate.generation
        assert generation.usage.prompt_tokens == len(prompt(result.item_index))
        assert len(generation.outputs[0].token_ids) == 4
    batch = await client.get_batch(made.batch_id)
    assert batch.state == pb.BATCH_STATE_DONE
    assert batch.counts == pb.BatchCounts(total=40, succeeded=40)
    assert batch.priority == generation_pb2.PRIORITY_LOW
    assert (batch.expire_time.ToMilliseconds() - batch.end_time.ToMilliseconds()) == 86_400_000


async def test_requests_of_all_kinds_share_a_batch_and_an_items_fault_is_its_own_result(
    system: System, client: AsyncClient, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    labels = write_encoder(tmp_path_factory.mktemp("labels"), "bert", "labels")
    worker = system.add_worker(labels, "labels", PLAIN="no")
    await system.ready("labels")
    text, short = cpb.ClassificationInput(text=CORPUS[0]), cpb.ClassificationInput(text="a")
    items = [
        item(0, custom_id="a generation"),
        pb.BatchItem(custom_id="labels", classify=cpb.ClassifyRequest(model="labels", inputs=[text, text])),
        pb.BatchItem(custom_id="no vectors", embed=epb.EmbedRequest(model="labels", texts=["one"])),
        item(1, model="nothing"),
        item(2, max_tokens=5000),
        pb.BatchItem(custom_id="too many", classify=cpb.ClassifyRequest(model="labels", inputs=[short] * 2049)),
    ]
    made = await client.create_batch(items)
    by_id = {result.custom_id: result for result in await read(client, made.batch_id)}
    await client.delete_batch(made.batch_id)
    worker.kill()
    system.workers.remove(worker)
    assert by_id.keys() == {"a generation", "labels", "no vectors", "3", "4", "too many"}
    alone = await client.generate(prompt(0), model=MODEL, max_tokens=4, temperature=0)
    assert by_id["a generation"].generate.generation.outputs[0].token_ids == alone.outputs[0].token_ids
    answer = by_id["labels"].classify
    assert len(answer.classifications) == 2
    assert answer.classifications[0] == answer.classifications[1]
    assert sum(label.score for label in answer.classifications[0].labels) == pytest.approx(1, abs=1e-5)
    assert summary(by_id["no vectors"]) == (grpc.StatusCode.FAILED_PRECONDITION, "TASK_NOT_SERVED")
    assert summary(by_id["3"]) == (NOT_FOUND, "MODEL_NOT_FOUND")
    assert summary(by_id["4"]) == (INVALID, "CONTEXT_LENGTH_EXCEEDED")
    assert summary(by_id["too many"]) == (INVALID, "FIELD_OUT_OF_RANGE")


async def test_results_are_read_again_behind_any_index_on_any_gateway(system: System, client: AsyncClient) -> None:
    made = await client.create_batch([item(index, max_tokens=1) for index in range(270)])
    whole = await read(client, made.batch_id)
    for gateway, after in zip(system.gateways * 2, (0, 7, 269, 270), strict=True):
        key = next(value.split()[1] for _, value in client.metadata)
        async with system.client(gateway, key=key) as other:
            stub = other.batch.StreamBatchResults(
                pb.StreamBatchResultsRequest(batch_id=made.batch_id, after_index=after), metadata=other.metadata
            )
            events = [event async for event in stub]
            assert [event.result for event in events[1:-1]] == whole[after:]
            for end in (events[0], events[-1]):
                assert end.batch.counts.succeeded == 270
    with refused() as refusal:
        await read(client, made.batch_id, 271)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "INDEX_OUT_OF_RANGE")
    assert refusal.error is not None
    assert dict(refusal.error.metadata) == {"field": "after_index", "limit": "270", "got": "271"}


# -- what is refused when a batch is made


REFUSED: list[tuple[list[pb.CreateBatchRequest], str, str]] = [
    ([], "FIELD_REQUIRED", "header"),
    ([part(item(0))], "FIELD_REQUIRED", "header"),
    ([header()], "FIELD_REQUIRED", "items"),
    ([header(), header()], "FIELD_REQUIRED", "items[0]"),
    ([header(), pb.CreateBatchRequest()], "FIELD_REQUIRED", "items[0]"),
    ([header(), part(pb.BatchItem())], "FIELD_REQUIRED", "items[0]"),
    ([header(), part(item(0, model=""))], "FIELD_REQUIRED", "items[0].generate.model"),
    ([header(idempotency_key="a b"), part(item(0))], "FIELD_INVALID", "header.idempotency_key"),
    ([header(display_name="a\nb"), part(item(0))], "FIELD_INVALID", "header.display_name"),
    ([header(priority=9), part(item(0))], "FIELD_INVALID", "header.priority"),
    ([header(), part(item(0, custom_id="x" * 129))], "FIELD_INVALID", "items[0].custom_id"),
    ([header(), part(item(0, custom_id="1")), part(item(0))], "FIELD_CONFLICT", "items[1].custom_id"),
    ([header(), part(item(0, idempotency_key="k"))], "FIELD_CONFLICT", "items[0].generate.idempotency_key"),
    ([header(), part(item(0, priority=2))], "FIELD_CONFLICT", "items[0].generate.priority"),
    ([header(), part(item(0, disconnect_grace=Duration()))], "FIELD_CONFLICT", "items[0].generate.disconnect_grace"),
    ([header(), *(part(item(0)) for _ in range(301))], "FIELD_OUT_OF_RANGE", "items"),
    ([header(), *(part(item(0, cache_salt=b"x" * 9000)) for _ in range(7))], "FIELD_OUT_OF_RANGE", "items"),
]


@pytest.mark.parametrize(("parts", "reason", "field"), REFUSED)
async def test_what_no_batch_may_be_is_refused_by_field_and_nothing_of_it_is_kept(
    system: System, client: AsyncClient, parts: list[pb.CreateBatchRequest], reason: str, field: str
) -> None:
    with refused() as refusal:
        await create_raw(client, *parts)
    assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, reason, [field])
    assert await client.batches() == []
    assert await stored_items(system) == []


async def test_unknown_fields_are_refused_deep_in_an_item(client: AsyncClient) -> None:
    unknown = part(item(0))
    unknown.item.generate.MergeFromString(b"\xf8\x07\x01")  # field 127
    with refused() as refusal:
        await create_raw(client, header(), part(item(1)), unknown)
    assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, "UNKNOWN_FIELD", ["item.generate.127"])


async def test_rights_are_asked_for_when_a_batch_is_made(system: System, client: AsyncClient) -> None:
    cases: list[tuple[dict[str, Any], list[pb.CreateBatchRequest], tuple[grpc.StatusCode, str]]] = [
        ({"scopes": ("generate",)}, [header(), part(item(0))], (PERMISSION_DENIED, "METHOD_NOT_ALLOWED")),
        ({"scopes": ("batch", "tasks")}, [header(), part(item(0))], (PERMISSION_DENIED, "METHOD_NOT_ALLOWED")),
        ({"models": ("other",)}, [header(), part(item(0))], (PERMISSION_DENIED, "MODEL_NOT_ALLOWED")),
        ({}, [header(priority=1), part(item(0))], (PERMISSION_DENIED, "PRIORITY_NOT_ALLOWED")),
    ]
    for grants, parts, expected in cases:
        async with system.client(key=system.create_key("somebody", **grants)) as limited:
            with refused() as refusal:
                await create_raw(limited, *parts)
            assert (refusal.code, refusal.reason) == expected


async def test_other_tenants_batches_do_not_exist(system: System, client: AsyncClient) -> None:
    made = await client.create_batch([item(0)])
    await read(client, made.batch_id)
    async with system.client(key=system.create_key("stranger")) as stranger:
        for batch_id in (made.batch_id, "batch-" + "a" * 26, "x"):
            calls = (
                stranger.get_batch(batch_id),
                stranger.cancel_batch(batch_id),
                stranger.delete_batch(batch_id),
                read(stranger, batch_id),
            )
            for call in calls:
                with refused() as refusal:
                    await call
                assert refusal.summary == (NOT_FOUND, "BATCH_NOT_FOUND", "no such batch, or its results have expired")
        assert await stranger.batches() == []
    assert (await client.get_batch(made.batch_id)).counts.succeeded == 1


async def test_a_repeat_with_the_same_key_is_the_same_batch(client: AsyncClient) -> None:
    items = [part(item(index)) for index in range(5)]
    first = await create_raw(client, header(idempotency_key="k", display_name="x"), *items)
    again = await create_raw(client, header(idempotency_key="k", display_name="x"), *items)
    assert (first.replayed, again.replayed) == (False, True)
    assert again.batch.batch_id == first.batch.batch_id
    assert len(await read(client, first.batch.batch_id)) == 5
    for other in (items[:4], [*items[:4], part(item(9))]):
        with refused() as refusal:
            await create_raw(client, header(idempotency_key="k", display_name="x"), *other)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "IDEMPOTENCY_KEY_REUSED")
    await client.delete_batch(first.batch.batch_id)
    anew = await create_raw(client, header(idempotency_key="k", display_name="x"), *items)
    assert not anew.replayed
    assert len(await client.batches()) == 1


async def test_a_tenant_has_so_many_batches_and_lists_them_by_page_the_latest_first(client: AsyncClient) -> None:
    made = [await client.create_batch([item(index)], display_name=f"b{index}") for index in range(20)]
    with refused() as refusal:
        await create_raw(client, header(), part(item(0)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_BATCHES")
    assert [batch.display_name for batch in await client.batches()] == [f"b{index}" for index in range(19, -1, -1)]
    names: list[str] = []
    token = ""
    while True:
        request = pb.ListBatchesRequest(page_size=6, page_token=token)
        page = await client.batch.ListBatches(request, metadata=client.metadata)
        names.append(" ".join(batch.display_name for batch in page.batches))
        token = page.next_page_token
        if not token:
            break
    assert names == ["b19 b18 b17 b16 b15 b14", "b13 b12 b11 b10 b9 b8", "b7 b6 b5 b4 b3 b2", "b1 b0"]
    for batch in made:
        await read(client, batch.batch_id)
        await client.delete_batch(batch.batch_id)
    assert await client.batches() == []


# -- ends before their time


async def test_a_cancelled_batch_ends_and_every_item_has_a_result(system: System, client: AsyncClient) -> None:
    made = await client.create_batch([item(index, max_tokens=120) for index in range(200)])
    seen = await begun(client, made.batch_id)
    assert (await client.cancel_batch(made.batch_id)).state in (
        pb.BATCH_STATE_CANCELLING,
        pb.BATCH_STATE_CANCELLED,
    )
    results = await read(client, made.batch_id)
    assert results[: len(seen)] == seen
    assert sorted(result.item_index for result in results) == list(range(200))
    cancelled = [result for result in results if result.WhichOneof("result") == "error"]
    assert {summary(result) for result in cancelled} == {(grpc.StatusCode.CANCELLED, "BATCH_CANCELLED")}
    batch = await client.cancel_batch(made.batch_id)
    assert batch.state == pb.BATCH_STATE_CANCELLED
    assert batch.counts == pb.BatchCounts(total=200, succeeded=200 - len(cancelled), cancelled=len(cancelled))
    assert len(cancelled) > 100
    assert await live_tenants(system) == set()
    await idle_fleet(system)


async def test_a_deleted_batch_leaves_nothing_behind_neither_results_nor_jobs(
    system: System, client: AsyncClient
) -> None:
    tenant, own = tenant_client(system)
    async with own:
        made = await own.create_batch([item(index, max_tokens=300) for index in range(200)], idempotency_key="k")
        await begun(own, made.batch_id)
        await own.delete_batch(made.batch_id)
        for call in (own.get_batch(made.batch_id), own.delete_batch(made.batch_id), read(own, made.batch_id)):
            with refused() as refusal:
                await call
            assert refusal.reason == "BATCH_NOT_FOUND"

        async def is_gone() -> bool:
            active = await superuser_call(system, "ZRANGE", "{batches}:active", "0", "-1")
            is_active = any(made.batch_id.encode() in member for member in active)
            return not is_active and not await superuser_call(system, "KEYS", f"*{made.batch_id}*")

        await until(is_gone, what="nothing of the batch")
        assert tenant not in await live_tenants(system)
        assert not await superuser_call(system, "KEYS", f"{{t:{tenant}}}:b*")
        await idle_fleet(system)


async def test_a_revoked_keys_items_are_refused_from_then_on(system: System, client: AsyncClient) -> None:
    tenant, own = tenant_client(system, quotas=Quotas(max_live=2))  # so that it takes its time
    async with own, system.client(key=system.create_key(tenant)) as colleague:
        made = await own.create_batch([item(index, max_tokens=120) for index in range(250)])
        await begun(own, made.batch_id)
        redis = connect(RedisSettings(url=system.server.url))
        await ApiKeys(redis).revoke((await ApiKeys(redis).list(tenant))[0].key_id)  # the oldest
        await redis.aclose()
        results = await read(colleague, made.batch_id)
        assert sorted(result.item_index for result in results) == list(range(250))
        errors = {summary(result) for result in results if result.WhichOneof("result") == "error"}
        assert errors == {(PERMISSION_DENIED, "API_KEY_ENDED")}
        assert (await colleague.get_batch(made.batch_id)).counts.failed > 50
        await colleague.delete_batch(made.batch_id)


async def test_want_of_room_is_waited_for_and_no_items_fault(system: System, client: AsyncClient) -> None:
    _, own = tenant_client(system, quotas=Quotas(max_live=2))
    async with own:
        made = await own.create_batch([item(index) for index in range(30)])
        await read(own, made.batch_id)
        assert (await own.get_batch(made.batch_id)).counts.succeeded == 30
    assert any("batch.no_room" in gateway.log() for gateway in system.gateways)


async def test_a_killed_gateway_and_a_killed_worker_lose_nothing_and_repeat_nothing(
    system: System, client: AsyncClient, folder: Path
) -> None:
    tenant, own = tenant_client(system)
    async with own:
        made = await own.create_batch([item(index, max_tokens=12) for index in range(240)])
        reading = asyncio.create_task(read(own, made.batch_id))
        await begun(own, made.batch_id, 20)
        system.workers[0].kill()
        system.workers[0].start()
        await begun(own, made.batch_id, 60)
        (feeding,) = (gateway for gateway in system.gateways if feeds(gateway, made.batch_id))
        feeding.kill()
        results = await reading
        assert [result.index for result in results] == list(range(1, 241))
        assert sorted(result.item_index for result in results) == list(range(240))
        assert (await own.get_batch(made.batch_id)).counts == pb.BatchCounts(total=240, succeeded=240)
        assert await read(own, made.batch_id) == results
        assert await num_generations(system, tenant) == 240, "each ran once, and is counted once"
        (other,) = (gateway for gateway in system.gateways if gateway is not feeding)
        assert f'"batch_id": "{made.batch_id}", "epoch": 2' in other.log()


async def test_a_gateway_that_ends_leaves_its_batches_to_others_at_once(system: System, client: AsyncClient) -> None:
    tenant, own = tenant_client(system)
    async with own:
        made = await own.create_batch([item(index, max_tokens=12) for index in range(120)])
        await begun(own, made.batch_id, 10)
        (feeding,) = (gateway for gateway in system.gateways if feeds(gateway, made.batch_id))
        (other,) = (gateway for gateway in system.gateways if gateway is not feeding)
        assert await asyncio.to_thread(feeding.stop) == 0
        ends = [line for line in feeding.log().splitlines() if "batch.left" in line and made.batch_id in line]
        assert not ends, "it had not come to its end there"
        results = await read(own, made.batch_id)
        assert sorted(result.item_index for result in results) == list(range(120))
        assert await num_generations(system, tenant) == 120
        assert feeds(other, made.batch_id)


async def test_cancelling_ends_what_a_killed_gateway_had_fed(system: System, client: AsyncClient) -> None:
    made = await client.create_batch([item(index, max_tokens=400) for index in range(60)])
    await begun(client, made.batch_id)
    (feeding,) = (gateway for gateway in system.gateways if feeds(gateway, made.batch_id))
    feeding.kill()
    await client.cancel_batch(made.batch_id)
    results = await read(client, made.batch_id)
    assert sorted(result.item_index for result in results) == list(range(60))
    assert (await client.get_batch(made.batch_id)).state == pb.BATCH_STATE_CANCELLED
    assert await live_tenants(system) == set()


async def test_a_batch_that_runs_for_too_long_is_given_up(system: System, client: AsyncClient, folder: Path) -> None:
    hasty = system.add_gateway(TORCHRELAY_GATEWAY_BATCH_LIFETIME_S="1.5")
    await system.ready(MODEL)
    tenant = f"tenant-{random_id()}"
    async with system.client(hasty, key=system.create_key(tenant)) as own:
        made = await own.create_batch([item(index, max_tokens=400) for index in range(100)])
        results = await read(own, made.batch_id)
        late = {summary(result) for result in results if result.WhichOneof("result") == "error"}
        assert late == {(grpc.StatusCode.DEADLINE_EXCEEDED, "BATCH_EXPIRED")}
        batch = await own.get_batch(made.batch_id)
        assert (batch.state, batch.counts.succeeded + batch.counts.failed) == (pb.BATCH_STATE_DONE, 100)
    await system.scale(folder, gateways=2)
    await idle_fleet(system)


# -- the command


async def test_a_file_becomes_a_file_and_goes_on_where_it_was_broken_off(
    system: System, client: AsyncClient, tmp_path: Path
) -> None:
    requests, found = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    line = {"generate": {"input": {"text": "one two"}, "config": {"max_tokens": 3}}}
    requests.write_text("".join(json.dumps({"custom_id": f"c{index}", **line}) + "\n" for index in range(9)) + "\n")
    done = await asyncio.to_thread(command, system, "run", str(requests), "-m", MODEL, "-o", str(found))
    assert done.stdout == ""
    batch_id = done.stderr.split()[1].rstrip(":")
    assert done.stderr.splitlines() == [f"batch {batch_id}: 9 items", "9 of 9 succeeded"]
    results = [json.loads(text) for text in found.read_text().splitlines()]
    assert [int(result["index"]) for result in results] == list(range(1, 10))
    assert {result["custom_id"] for result in results} == {f"c{index}" for index in range(9)}
    assert all(len(result["generate"]["generation"]["outputs"][0]["token_ids"]) == 3 for result in results)
    whole = found.read_text()
    found.write_text("".join(whole.splitlines(keepends=True)[:4]) + whole.splitlines()[4][:30])
    await asyncio.to_thread(command, system, "run", "--batch", batch_id, "-o", str(found))
    assert found.read_text() == whole
    listed = (await asyncio.to_thread(command, system, "list")).stdout
    assert listed.splitlines()[1].split()[:9] == [batch_id, "requests.jsonl", "done", "9", "0", "0", "9", "0", "0"]
    shown = json.loads((await asyncio.to_thread(command, system, "get", batch_id, "--json")).stdout)
    assert shown["counts"] == {"total": 9, "succeeded": 9}
    assert (await asyncio.to_thread(command, system, "cancel", batch_id)).stdout == "done\n"
    assert (await asyncio.to_thread(command, system, "results", batch_id)).stdout == whole
    await asyncio.to_thread(command, system, "delete", batch_id)
    assert "no such batch" in (await asyncio.to_thread(command, system, "get", batch_id, status=1)).stderr


async def test_an_interrupted_command_says_how_to_go_on_and_the_batch_goes_on(
    system: System, client: AsyncClient, tmp_path: Path
) -> None:
    requests, found = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    line = {"generate": {"model": MODEL, "input": {"text": "one two"}, "config": {"max_tokens": 150}}}
    requests.write_text((json.dumps(line) + "\n") * 200)  # seconds of work, of which the first result takes little
    address = ["--address", system.gateways[0].address, "--api-key", system.key, "--insecure"]
    program = [sys.executable, "-c", "from torchrelay.cli.main import main; main()", "batch", "run", str(requests)]
    process = await asyncio.create_subprocess_exec(*program, "-o", str(found), *address, stderr=asyncio.subprocess.PIPE)
    try:

        async def has_results() -> bool:
            return found.exists() and "\n" in found.read_text()

        await until(has_results)
        process.send_signal(signal.SIGINT)
        says = (await asyncio.wait_for(process.communicate(), 30))[1].decode()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 130, says
    batch_id = says.split()[1].rstrip(":")
    assert f"torchrelay batch run --batch {batch_id} --output {found}" in says
    assert f"torchrelay batch cancel {batch_id}" in says
    done = await asyncio.to_thread(command, system, "run", "--batch", batch_id, "-o", str(found))
    assert done.stderr == "200 of 200 succeeded\n"
    indices = [int(json.loads(text)["index"]) for text in found.read_text().splitlines()]
    assert indices == list(range(1, 201))

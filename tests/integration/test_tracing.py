"""One trace from the caller through the queue to whoever computes, sent to a collector's stub over OTLP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from tests.builders_collector import Collector, Span, collecting
from tests.builders_common import stopped
from tests.builders_http import HttpDoor
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system, until

MODEL = "tiny"
SERVER, CONSUMER = 2, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with running_system(tmp_path) as running:
        yield running


def door(system: System) -> HttpDoor:
    return HttpDoor(system.gateways[0].openai_address, system.key)


def traced(collector: Collector, **more: str) -> dict[str, str]:
    return {"TORCHRELAY_TRACING_ENDPOINT": f"http://{collector.address}", **more}


async def found(collector: Collector, trace_id: str, **wanted: int) -> list[Span]:
    """Wait until a trace has so many spans of each name's first word, and return them."""

    def counts() -> dict[str, int]:
        names = [span.name.partition(" ")[0].rpartition("/")[2] for span in collector.of(trace_id)]
        return {name: names.count(name) for name in wanted}

    async def all_there() -> bool:
        return counts() == wanted

    try:
        await until(all_there, what="the trace")
    except AssertionError:
        pytest.fail(f"{wanted} wanted, there are {[(span.service, span.name) for span in collector.of(trace_id)]}")
    return collector.of(trace_id)


def one(spans: list[Span], name: str) -> Span:
    (span,) = [span for span in spans if name in span.name]
    return span


async def test_a_takeover_is_one_trace_from_the_client_to_both_workers(system: System, folder: Path) -> None:
    async with collecting() as collector:
        system.add_gateway(**traced(collector))
        workers = [system.add_worker(folder, MODEL, **traced(collector)) for _ in range(2)]
        await system.ready(MODEL, num_workers=2)
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(collector.address, insecure=True)))
        num_tokens, killed = 0, False
        with provider.get_tracer("tests").start_as_current_span("ask the model") as client_span:
            trace_id = f"{client_span.get_span_context().trace_id:032x}"
            async with system.client() as client:
                stream = client.stream([3, 4, 5], model=MODEL, max_tokens=1500)  # brings the current span along
                async for event in stream:
                    num_tokens += sum(len(delta.token_ids) for delta in event.deltas.deltas)
                    if num_tokens >= 20 and not killed:
                        killed = True
                        worker = await system.worker_of(stream.generation_id)
                        with stopped(system.server):  # a fast machine is through before what ended is told
                            await found(collector, trace_id, queue=1, claim=1)
                            worker.kill()
        assert num_tokens == 1500
        await asyncio.to_thread(provider.shutdown)
        spans = await found(collector, trace_id, ask=1, StreamGenerate=1, queue=1, claim=2, text_completion=1)

    asked, call, waited = one(spans, "ask"), one(spans, "StreamGenerate"), one(spans, "queue")
    first, second = [span for span in spans if span.name.startswith("claim")]
    computed = one(spans, "text_completion")
    assert call.parent_id == asked.span_id
    assert {waited.parent_id, first.parent_id, second.parent_id} == {call.span_id}
    assert computed.parent_id == second.span_id  # what the first one computed ended with it
    assert second.links == (first.span_id,)
    assert (first.attributes["torchrelay.claim.kind"], first.links) == ("first", ())
    assert second.attributes["torchrelay.claim.kind"] == "takeover"
    assert first.attributes["torchrelay.worker_id"] != second.attributes["torchrelay.worker_id"]
    assert (call.kind, call.service, first.kind, first.service) == (
        SERVER, "torchrelay-gateway", CONSUMER, "torchrelay-worker",
    )  # fmt: skip
    # The clocks of all processes are this machine's: acceptance lies within the call, and the wait ends with the claim.
    assert call.start_ns <= waited.start_ns + 2_000_000
    assert waited.start_ns <= waited.end_ns <= first.start_ns < second.start_ns <= computed.start_ns < computed.end_ns
    assert first.start_ns < call.end_ns
    assert call.attributes["gen_ai.request.model"] == computed.attributes["gen_ai.request.model"] == MODEL
    assert call.attributes["gen_ai.response.id"] == computed.attributes["gen_ai.response.id"] == stream.generation_id
    assert call.attributes["rpc.grpc.status_code"] == 0
    assert computed.attributes["gen_ai.usage.input_tokens"] == 3
    assert computed.attributes["gen_ai.usage.output_tokens"] == 1500
    assert computed.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert computed.events == ("first token",)
    assert sum(worker.is_running for worker in workers) == 1


async def test_no_span_holds_text_and_refusals_are_errors(system: System, folder: Path) -> None:
    secret = "the caller's own words"
    async with collecting() as collector:
        system.add_gateway(**traced(collector))
        system.add_worker(folder, MODEL, **traced(collector))
        await system.ready(MODEL)
        trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
        headers = {"traceparent": f"00-{trace_id}-{parent}-01"}
        body = {"model": MODEL, "prompt": secret, "max_tokens": 3, "temperature": 0}
        answer = await door(system).post("/v1/completions", body, headers)
        assert answer.status == 200, answer.body
        assert (await door(system).post("/v1/completions", {**body, "model": "none"}, headers)).status == 404
        spans = await found(collector, trace_id, StreamGenerate=2, queue=1, claim=1, text_completion=1)
    calls = [span for span in spans if span.kind == SERVER]
    assert {span.parent_id for span in calls} == {parent}
    assert [(span.is_error, span.attributes.get("error.type")) for span in calls] == [
        (False, None),
        (True, "MODEL_NOT_FOUND"),
    ]
    told = json.dumps([span.__dict__ for span in collector.spans])
    assert secret not in told
    assert answer.json["choices"][0]["text"] not in told


async def test_a_trace_that_is_not_sampled_stays_so_and_one_that_is_none_begins_anew(
    system: System, folder: Path
) -> None:
    async with collecting() as collector:
        system.add_gateway(**traced(collector))
        system.add_worker(folder, MODEL, **traced(collector))
        await system.ready(MODEL)
        body = {"model": MODEL, "prompt": "a", "max_tokens": 3}
        unsampled = "0" * 31 + "1"
        for traceparent in (f"00-{unsampled}-00f067aa0ba902b7-00", "00-" + "z" * 32 + "-00f067aa0ba902b7-01"):
            assert (await door(system).post("/v1/completions", body, {"traceparent": traceparent})).status == 200

        async def has_begun() -> bool:
            names = {span.name.partition(" ")[0].rpartition("/")[2] for span in collector.spans}
            return {"claim", "StreamGenerate"} <= names

        await until(has_begun, what="the trace that begins here")
        (call,) = [span for span in collector.spans if span.kind == SERVER and "Generate" in span.name]
        assert call.parent_id == ""
        assert not collector.of(unsampled)


async def test_a_gateway_without_tracing_passes_the_callers_trace_on(system: System, folder: Path) -> None:
    async with collecting() as collector:
        system.add_gateway()
        system.add_worker(folder, MODEL, **traced(collector))
        await system.ready(MODEL)
        trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
        body = {"model": MODEL, "prompt": "a", "max_tokens": 3}
        await door(system).post("/v1/completions", body, {"traceparent": f"00-{trace_id}-{parent}-01"})
        spans = await found(collector, trace_id, queue=1, claim=1, text_completion=1)
    assert {span.parent_id for span in spans if span.name.split()[0] in ("queue", "claim")} == {parent}


async def test_a_collector_that_is_away_costs_spans_and_nothing_else(system: System, folder: Path) -> None:
    gateway = system.add_gateway(TORCHRELAY_TRACING_ENDPOINT="http://127.0.0.1:1")
    system.add_worker(folder, MODEL, TORCHRELAY_TRACING_ENDPOINT="http://127.0.0.1:1")
    await system.ready(MODEL)
    body = {"model": MODEL, "prompt": "a", "max_tokens": 3}
    assert (await door(system).post("/v1/completions", body)).status == 200
    assert gateway.stop() == 0

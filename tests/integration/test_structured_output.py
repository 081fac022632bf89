"""Structured output through gateway and worker: what comes matches, and what cannot be matched is refused by name."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.builders_calls import Outcome, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system
from tests.structured.judge import why_not_valid
from tests.structured.schemas import NamedSchema, drawn_schemas, known_schemas
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
LENGTH = 4096  # more than any bounded output takes, a byte a token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights: without a mask it never writes two right characters in a row."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=LENGTH + 64)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway()
        system.add_worker(folder, MODEL)
        yield system


@pytest.fixture
async def client(system: System) -> AsyncIterator[AsyncClient]:
    await system.ready(MODEL)
    async with system.client() as client:
        yield client
        # Whatever a test sent: both serve on.
        assert (await run(client, choices=["on"])).output.text == "on"


def constraint(**kind: Any) -> pb.StructuredOutput:
    if "choices" in kind:
        return pb.StructuredOutput(choices=pb.Choices(values=kind["choices"]))
    if "json_object" in kind:
        return pb.StructuredOutput(json_object=pb.JsonObject())
    return pb.StructuredOutput(**kind)


async def run(client: AsyncClient, prompt: str = "Answer: ", **options: Any) -> Outcome:
    """Run one request, greedy unless told otherwise. A constraint is named by its kind."""
    kinds = pb.StructuredOutput.DESCRIPTOR.fields_by_name
    kind = {name: options.pop(name) for name in list(options) if name in kinds}
    if kind:
        options["structured_output"] = constraint(**kind)
    stream = client.stream(prompt, **{"model": MODEL, "max_tokens": 60, "temperature": 0.0, **options})
    return await Outcome(stream).read()


def check_json(outcome: Outcome, wanted: NamedSchema) -> None:
    for output in outcome.outputs:
        if output.finish_reason == pb.FINISH_REASON_STOP:
            assert why_not_valid(output.text, wanted.schema) is None, (wanted, output.text)
        else:
            assert output.finish_reason == pb.FINISH_REASON_LENGTH
            assert not wanted.is_bounded, (wanted, output.text[-200:])


async def test_what_stops_is_valid_and_bounded_schemas_stop(client: AsyncClient) -> None:
    schemas = [*known_schemas()[:4], *drawn_schemas(seed=606, count=8)]
    requests = [
        run(
            client,
            json_schema=wanted.text,
            temperature=temperature,
            seed=number,
            max_tokens=LENGTH if wanted.is_bounded else 300,
        )
        for temperature in (0.0, 1.0)
        for number, wanted in enumerate(schemas)
    ]
    others = [run(client, f"some text {i}", seed=i, temperature=1.0, max_tokens=40) for i in range(4)]
    outcomes = await asyncio.gather(*requests, *others)
    for outcome, wanted in zip(outcomes, schemas * 2, strict=False):
        check_json(outcome, wanted)
    stopped = [
        outcome for outcome in outcomes[: len(requests)] if outcome.output.finish_reason == pb.FINISH_REASON_STOP
    ]
    assert len(stopped) >= len(requests) * 2 // 3
    alone = await run(client, "some text 0", seed=0, temperature=1.0, max_tokens=40)
    assert alone.token_ids == outcomes[len(requests)].token_ids, "its neighbours' masks changed it"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_every_kind_holds(client: AsyncClient, temperature: float) -> None:
    """With the other parameters that change which token is chosen."""
    for seed, options in enumerate([{}, {"top_k": 3}, {"top_p": 0.7, "min_p": 0.01}, {"repetition_penalty": 1.3}]):
        common = {"seed": seed, "temperature": temperature, **options}
        expression, lark, choice, jsons = await asyncio.gather(
            run(client, regex=r"[A-Z][a-z]{2,8} \d{4}|né+", num_outputs=3, **common),
            run(client, grammar='start: item ("," item)*\nitem: /[0-9]{1,3}/ | "(" start ")"', **common),
            run(client, choices=["a", "ab", "日本 é", 'q"\\\n\x01', "x" * 40], num_outputs=4, logprobs=True, **common),
            run(client, json_object=True, max_tokens=200, **common),
        )
        for output in expression.outputs:
            assert re.fullmatch(r"[A-Z][a-z]{2,8} [0-9]{4}|né+", output.text) or (
                output.finish_reason == pb.FINISH_REASON_LENGTH and output.text.startswith("né")
            ), output.text
        assert re.fullmatch(r"[0-9,()]+", lark.output.text), lark.output.text
        if lark.output.finish_reason == pb.FINISH_REASON_STOP:
            assert lark.output.text.count("(") == lark.output.text.count(")")
        for output in choice.outputs:
            assert output.text in ("a", "ab", "日本 é", 'q"\\\n\x01', "x" * 40)
            assert output.finish_reason == pb.FINISH_REASON_STOP
            assert len(output.logprobs) == len(output.token_ids)
        assert jsons.output.text.startswith("{")


async def test_it_ends_where_nothing_may_follow_also_at_the_last_token(client: AsyncClient) -> None:
    whole = await run(client, regex="abc", max_tokens=3)
    assert (whole.output.text, len(whole.token_ids)) == ("abc", 3)
    assert whole.output.end is not None
    assert whole.output.finish_reason == pb.FINISH_REASON_STOP
    assert whole.output.end.WhichOneof("stop_match") is None
    cut = await run(client, regex="abc", max_tokens=2)
    assert (cut.output.text, cut.output.finish_reason) == ("ab", pb.FINISH_REASON_LENGTH)
    stopped = await run(client, regex="abc", stop=["b"])
    assert (stopped.output.text, stopped.output.finish_reason) == ("a", pb.FINISH_REASON_STOP)
    empty = await run(client, grammar='start: ""')
    assert (empty.output.text, empty.output.finish_reason) == ("", pb.FINISH_REASON_STOP)
    assert empty.output.end is not None
    assert empty.output.end.stop_token_id == 2


async def test_a_number_ends_where_it_may(client: AsyncClient) -> None:
    outcomes = await asyncio.gather(
        *(run(client, json_schema='{"type": "number"}', seed=i, temperature=1.0, max_tokens=200) for i in range(10)),
        run(client, json_schema='{"const": 1000000000000000000000000000000000000}', max_tokens=200),
    )
    for outcome in outcomes:
        assert outcome.output.finish_reason == pb.FINISH_REASON_STOP, outcome.output.text
        float(outcome.output.text)
    assert float(outcomes[-1].output.text) == 1e36


async def test_a_takeover_goes_on_in_the_grammar(system: System, folder: Path, client: AsyncClient) -> None:
    """The same tokens as without one, sampled and with two outputs: the matcher is where the log ends."""
    item = {"type": "string", "minLength": 60, "maxLength": 70}
    schema = {"type": "array", "items": item, "minItems": 6, "maxItems": 7}
    text = NamedSchema("long", schema, is_bounded=True).text
    wanted: dict[str, Any] = {"temperature": 1.0, "seed": 5, "num_outputs": 2, "max_tokens": LENGTH}
    alone = await run(client, json_schema=text, **wanted)
    system.add_worker(folder, MODEL)
    await system.ready(MODEL, num_workers=2)
    stream = client.stream("Answer: ", model=MODEL, structured_output=constraint(json_schema=text), **wanted)
    taken_over = Outcome(stream)
    reading = asyncio.create_task(taken_over.read())
    while not taken_over.outputs or min(len(output.token_ids) for output in taken_over.outputs) < 30:
        await asyncio.sleep(0.01)
        assert not reading.done(), "too fast to be killed midway"
    (await system.worker_of(taken_over.generation_id)).kill()
    await asyncio.wait_for(reading, 60)
    await system.scale(folder, gateways=1, workers=1, name=MODEL)
    assert taken_over.finished is not None
    assert taken_over.finished.timings.num_takeovers == 1
    for before, after in zip(alone.outputs, taken_over.outputs, strict=True):
        assert after.token_ids == before.token_ids
        assert why_not_valid(after.text, schema) is None


SCHEMA, FIELD = "config.structured_output.json_schema", "config.structured_output"
BAD: list[tuple[dict[str, Any], str, str, str]] = [
    ({"json_schema": '{"type":'}, "GRAMMAR_INVALID", SCHEMA, "not JSON"),
    ({"json_schema": "[]"}, "GRAMMAR_INVALID", SCHEMA, "JSON object"),
    ({"json_schema": ""}, "GRAMMAR_INVALID", SCHEMA, "not JSON"),
    ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "GRAMMAR_INVALID", SCHEMA, "uniqueItems"),
    ({"json_schema": '{"type": "text"}'}, "GRAMMAR_INVALID", SCHEMA, "type"),
    ({"json_schema": '{"x-guidance": {"lenient": true}}'}, "GRAMMAR_INVALID", SCHEMA, "x-guidance"),
    ({"json_schema": '{"$ref": "http://example.org/s"}'}, "GRAMMAR_INVALID", SCHEMA, "not present in a registry"),
    ({"json_schema": '{"$ref": "#"}'}, "GRAMMAR_INVALID", SCHEMA, "no text"),
    ({"json_schema": '{"minProperties": 1}'}, "GRAMMAR_INVALID", SCHEMA, "minProperties"),
    ({"json_schema": '{"const": "\\u0001"}'}, "GRAMMAR_INVALID", SCHEMA, "control characters"),
    ({"json_schema": '{"type": "integer", "multipleOf": 1000003}'}, "GRAMMAR_TOO_COMPLEX", SCHEMA, "multipleOf"),
    ({"json_schema": '{"items":' * 80 + "{}" + "}" * 80}, "GRAMMAR_TOO_COMPLEX", SCHEMA, "64"),
    ({"json_schema": "[" * 60_000}, "GRAMMAR_TOO_COMPLEX", SCHEMA, "64"),
    ({"json_schema": '{"title": "' + "x" * 70_000 + '"}'}, "GRAMMAR_TOO_LARGE", SCHEMA, "65536"),
    ({"regex": "("}, "GRAMMAR_INVALID", f"{FIELD}.regex", "unclosed group"),
    ({"regex": "(?=a)b"}, "GRAMMAR_INVALID", f"{FIELD}.regex", "look-around"),
    ({"choices": []}, "FIELD_REQUIRED", f"{FIELD}.choices.values", "at least one"),
    ({"choices": ["a", ""]}, "FIELD_REQUIRED", f"{FIELD}.choices.values", "empty"),
    ({"choices": [str(i) for i in range(10_000)]}, "GRAMMAR_TOO_LARGE", f"{FIELD}.choices", "1000"),
    ({"grammar": "start: nothing"}, "GRAMMAR_INVALID", f"{FIELD}.grammar", "unknown name"),
    ({"grammar": "start: A\nA: /a/ & /b/"}, "GRAMMAR_INVALID", f"{FIELD}.grammar", "no text"),
    ({"grammar": "start: a\na[temperature=2]: /b/"}, "GRAMMAR_INVALID", f"{FIELD}.grammar", "temperature"),
    (
        {"grammar": 'start: %json {"type": "integer", "multipleOf": 1000003}'},
        "GRAMMAR_TOO_COMPLEX",
        f"{FIELD}.grammar",
        "multipleOf",
    ),
    (
        {"grammar": "start: A\nA: ~/(.*a.{30})/ & /(.*b.{30})/ & /.*c.{30}/"},
        "GRAMMAR_TOO_COMPLEX",
        f"{FIELD}.grammar",
        "fuel",
    ),
    ({}, "FIELD_REQUIRED", FIELD, "json_schema"),
]


async def test_what_cannot_be_kept_to_is_refused_by_name(client: AsyncClient) -> None:
    for kind, reason, field, words in BAD:
        request = client.stream(
            "x", model=MODEL, max_tokens=4, structured_output=constraint(**kind) if kind else pb.StructuredOutput()
        )
        with refused() as refusal:
            await Outcome(request).read()
        code, given, message = refusal.summary
        assert (code, given, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, reason, [field]), (kind, message)
        assert re.search(words, message), message
        assert len(message) < 400


async def test_a_grammar_that_outgrows_a_step_ends_alone(client: AsyncClient) -> None:
    """It passes the door, since only what is written tells how much work it is; others do not notice."""
    wide = "start: any+\nany: " + " | ".join(f'"{i}x"' for i in range(3000))
    beside = asyncio.gather(*(run(client, choices=["one", "two"], seed=i) for i in range(4)))
    with refused() as refusal:
        await run(client, grammar=wide)
    assert refusal.summary[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "GRAMMAR_TOO_COMPLEX")
    assert refusal.fields == [FIELD]
    assert {outcome.output.text for outcome in await beside} <= {"one", "two"}


async def test_parameters_that_forbid_all_that_is_allowed_end_it_by_name(client: AsyncClient) -> None:
    with refused() as refusal:
        await run(client, regex="aaaaaaaa", no_repeat_ngram_size=1)
    assert refusal.summary[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "ALL_TOKENS_FORBIDDEN")
    assert refusal.fields == ["config"]


async def test_an_end_that_the_model_forces_gives_way_to_a_constraint(
    system: System, client: AsyncClient, tmp_path: Path
) -> None:
    """The last token of max_tokens would have to be an end, which is not allowed inside of the text."""
    folder = write_tiny_model(tmp_path / "forcing")
    defaults = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**defaults, "forced_eos_token_id": 2}))
    worker = system.add_worker(folder, "forcing")
    try:
        await system.ready("forcing")
        free = await run(client, max_tokens=4, model="forcing")
        assert free.output.token_ids[-1] == 2
        assert (await run(client, max_tokens=4, model="forcing", regex="a{9}")).output.text == "aaaa"
        with refused() as refusal:
            await run(client, max_tokens=4, regex="a{9}", forced_eos_token_id=2)
        assert refusal.summary[1] == "FIELD_CONFLICT"
        assert refusal.fields == ["config.forced_eos_token_id", FIELD]
    finally:
        worker.kill()
        system.workers.remove(worker)

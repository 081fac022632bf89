"""What the gateway refuses: with which status, reason and field; and that it serves on after all of it."""

from __future__ import annotations

import asyncio
import math
import os
import random
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.builders_calls import Outcome, Refusal, events_of, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system, until
from torchrelay.admin.v1beta1 import api_key_pb2, api_key_pb2_grpc
from torchrelay.client import AsyncClient, RelayError
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

MODEL = "tiny"
COLD = "cold"
CONTEXT = 256
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
UNAUTHENTICATED, EXHAUSTED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[System]:
    """A gateway with a short queue, a worker, and a model whose worker has gone."""
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway(
            TORCHRELAY_QUEUE_MAX_QUEUED="3",
            TORCHRELAY_QUEUE_MAX_QUEUED_PER_TENANT="2",
        )
        system.add_worker(folder, MODEL)
        cold = system.add_worker(folder, COLD)
        asyncio.run(system.ready(MODEL, COLD))
        cold.stop()
        yield system


@pytest.fixture(scope="module")
def other_key(system: System) -> str:
    """The key of another tenant."""
    return system.create_key("other")


@pytest.fixture
async def client(system: System) -> AsyncIterator[AsyncClient]:
    await system.ready(MODEL)
    async with system.client() as client:
        yield client
        # Whatever a test sent: the gateway serves on.
        outcome = await Outcome(client.stream("still there?", model=MODEL, max_tokens=3)).read()
        assert outcome.finished is not None


def request(**fields: Any) -> pb.StreamGenerateRequest:
    """A good request of a few tokens, with some of its fields replaced."""
    config = {"max_tokens": 2, **fields.pop("config", {})}
    good: dict[str, Any] = {
        "model": MODEL,
        "input": pb.GenerationInput(text="hello"),
        "config": pb.GenerationConfig(**{name: value for name, value in config.items() if value is not None}),
    }
    return pb.StreamGenerateRequest(**{**good, **fields})


async def refusal_of(client: AsyncClient, message: pb.StreamGenerateRequest, **options: Any) -> Refusal:
    with refused() as refusal:
        options.setdefault("metadata", client.metadata)
        await Outcome(events_of(client.generation.StreamGenerate(message, **options))).read()
    return refusal


# -- credentials ------------------------------------------------------------------------------------------------------


@pytest.mark.row(1, 2)
async def test_no_credentials_and_wrong_ones_are_told_apart_and_nothing_else_is(
    system: System, client: AsyncClient
) -> None:
    key = system.key
    wrong_checksum = key[:-1] + ("a" if key[-1] != "a" else "b")
    unknown = "tr_" + "A" * 60
    texts = set()
    for metadata in (
        [("authorization", f"Bearer {wrong_checksum}")],
        [("authorization", f"Bearer {unknown}")],
        [("x-api-key", "\x21nonsense")],
        [("authorization", "Basic dXNlcjpwYXNz")],
        [("authorization", "Bearer")],
        [("authorization", f"Bearer {'k' * 4000}")],
    ):
        refusal = await refusal_of(client, request(), metadata=metadata)
        assert (refusal.code, refusal.reason) == (UNAUTHENTICATED, "CREDENTIALS_INVALID"), metadata
        texts.add(refusal.error.message if refusal.error else "")
    assert len(texts) <= 2
    assert not any(key[3:9] in text or "nonsense" in text for text in texts), "what was sent is not repeated"
    refusal = await refusal_of(client, request(), metadata=[])
    assert (refusal.code, refusal.reason) == (UNAUTHENTICATED, "CREDENTIALS_MISSING")
    accepted = client.generation.StreamGenerate(request(), metadata=[("x-api-key", key)])
    assert (await Outcome(events_of(accepted)).read()).finished is not None


@pytest.mark.row(3)
async def test_revoked_and_expired_keys_read_like_unknown_ones(system: System, client: AsyncClient) -> None:
    async with grpc.aio.insecure_channel(system.gateways[0].admin_address) as channel:
        stub: api_key_pb2_grpc.ApiKeyServiceAsyncStub = api_key_pb2_grpc.ApiKeyServiceStub(channel)
        revoked = await stub.CreateApiKey(api_key_pb2.CreateApiKeyRequest(tenant="brief"))
        await stub.RevokeApiKey(api_key_pb2.RevokeApiKeyRequest(key_id=revoked.api_key.key_id))
        wish = api_key_pb2.CreateApiKeyRequest(tenant="brief")
        wish.expire_time.GetCurrentTime()
        wish.expire_time.seconds += 1
        expired = await stub.CreateApiKey(wish)
    unknown = await refusal_of(client, request(), metadata=[("authorization", "Bearer tr_" + "A" * 60)])

    async def is_refused() -> bool:
        call = client.model.ListModels(
            model_pb2.ListModelsRequest(), metadata=[("authorization", f"Bearer {expired.secret}")]
        )
        try:
            await call
        except grpc.aio.AioRpcError:
            return True
        return False

    await until(is_refused, what="the key's expiry")
    for key in (revoked.secret, expired.secret):
        refusal = await refusal_of(client, request(), metadata=[("authorization", f"Bearer {key}")])
        assert refusal.summary == unknown.summary


# -- fields -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A request that is refused: why, and which field is named."""

    message: pb.StreamGenerateRequest
    reason: str
    field: str
    code: grpc.StatusCode = INVALID


def chat(*messages: pb.ChatMessage) -> pb.GenerationInput:
    return pb.GenerationInput(chat=pb.ChatInput(messages=messages))


def message(role: int, *texts: str) -> pb.ChatMessage:
    return pb.ChatMessage(role=role, parts=[pb.ContentPart(text=text) for text in texts])  # type: ignore[arg-type]


def token_ids(*ids: int) -> pb.GenerationInput:
    return pb.GenerationInput(token_ids=pb.TokenIds(ids=ids))


def config(**fields: Any) -> pb.StreamGenerateRequest:
    return request(config=fields)


RANGE, REQUIRED, WRONG = "FIELD_OUT_OF_RANGE", "FIELD_REQUIRED", "FIELD_INVALID"
TOO_LONG = "CONTEXT_LENGTH_EXCEEDED"
SPEAK = message(pb.ROLE_USER, "hi")

BAD_FIELDS = {
    "no model": Bad(request(model=""), REQUIRED, "model"),
    "unknown model": Bad(request(model="nobody"), "MODEL_NOT_FOUND", "", NOT_FOUND),
    "huge model name": Bad(request(model="m" * 100_000), "MODEL_NOT_FOUND", "", NOT_FOUND),
    "model name with glob and braces": Bad(request(model="{*}:j:*\r\nX"), "MODEL_NOT_FOUND", "", NOT_FOUND),
    "no input": Bad(request(input=None), REQUIRED, "input"),
    "empty input": Bad(request(input=pb.GenerationInput()), REQUIRED, "input"),
    "empty text": Bad(request(input=pb.GenerationInput(text="")), REQUIRED, "input.text"),
    "no ids": Bad(request(input=token_ids()), REQUIRED, "input.token_ids.ids"),
    "no messages": Bad(request(input=chat()), REQUIRED, "input.chat.messages"),
    "no role": Bad(request(input=chat(SPEAK, message(0, "x"))), WRONG, "input.chat.messages[1].role"),
    "unknown role": Bad(request(input=chat(message(77, "x"))), WRONG, "input.chat.messages[0].role"),
    "no parts": Bad(request(input=chat(message(pb.ROLE_USER))), REQUIRED, "input.chat.messages[0].parts"),
    "unset part": Bad(
        request(input=chat(pb.ChatMessage(role=pb.ROLE_USER, parts=[pb.ContentPart()]))),
        REQUIRED,
        "input.chat.messages[0].parts[0]",
    ),
    "id outside the vocabulary": Bad(request(input=token_ids(5, 288)), RANGE, "input.token_ids.ids"),
    "largest id": Bad(request(input=token_ids(2**32 - 1)), RANGE, "input.token_ids.ids"),
    "prompt over the context": Bad(request(input=token_ids(*[5] * 300)), TOO_LONG, "input"),
    "prompt fills the context": Bad(request(input=token_ids(*[5] * CONTEXT)), TOO_LONG, "input"),
    "a megabyte of text": Bad(request(input=pb.GenerationInput(text="a" * (1 << 20))), TOO_LONG, "input"),
    "prompt and output over the context": Bad(config(max_tokens=CONTEXT), TOO_LONG, "config.max_tokens"),
    "max_length over the context": Bad(config(max_tokens=None, max_length=257), TOO_LONG, "config.max_length"),
    "max_length within the prompt": Bad(config(max_tokens=None, max_length=5), RANGE, "config.max_length"),
    "max_tokens and max_length": Bad(config(max_length=9), "FIELD_CONFLICT", "config.max_length"),
    "max_tokens 0": Bad(config(max_tokens=0), RANGE, "config.max_tokens"),
    "max_tokens largest": Bad(config(max_tokens=2**32 - 1), TOO_LONG, "config.max_tokens"),
    **{
        f"temperature {value}": Bad(config(temperature=value), RANGE, "config.temperature")
        for value in (math.nan, math.inf, -math.inf, -0.1, 2.1)
    },
    **{f"top_p {value}": Bad(config(top_p=value), RANGE, "config.top_p") for value in (0.0, math.nan, 1.01, -1.0)},
    **{f"min_p {value}": Bad(config(min_p=value), RANGE, "config.min_p") for value in (1.0, math.nan, -0.1)},
    **{
        f"repetition_penalty {value}": Bad(config(repetition_penalty=value), RANGE, "config.repetition_penalty")
        for value in (0.0, math.nan, 11.0)
    },
    "no_repeat_ngram_size 65": Bad(config(no_repeat_ngram_size=65), RANGE, "config.no_repeat_ngram_size"),
    "17 stop strings": Bad(config(stop=list("abcdefghijklmnopq")), RANGE, "config.stop"),
    "empty stop string": Bad(config(stop=["a", ""]), RANGE, "config.stop"),
    "long stop string": Bad(config(stop=["é" * 129]), RANGE, "config.stop"),
    "65 stop ids": Bad(config(stop_token_ids=range(65)), RANGE, "config.stop_token_ids"),
    "stop id outside the vocabulary": Bad(config(stop_token_ids=[288]), RANGE, "config.stop_token_ids"),
    "no outputs": Bad(config(num_outputs=0), RANGE, "config.num_outputs"),
    "17 outputs": Bad(config(num_outputs=17), RANGE, "config.num_outputs"),
    "long idempotency key": Bad(request(idempotency_key="k" * 129), WRONG, "idempotency_key"),
    "idempotency key with a line break": Bad(request(idempotency_key="a\r\nb"), WRONG, "idempotency_key"),
    "idempotency key beyond ASCII": Bad(request(idempotency_key="schlüssel"), WRONG, "idempotency_key"),
    "time limit 0": Bad(request(time_limit={"seconds": 0}), RANGE, "time_limit"),
    "negative time limit": Bad(request(time_limit={"seconds": -5}), RANGE, "time_limit"),
    "invalid time limit": Bad(request(time_limit={"seconds": 1, "nanos": -1}), RANGE, "time_limit"),
    "negative grace": Bad(request(disconnect_grace={"nanos": -1}), RANGE, "disconnect_grace"),
}


@pytest.mark.row(10, 11, 13, 14, 15, 16, 17, 18, 19, 20, 22, 36, 39)
async def test_every_bad_field_is_refused_by_name(client: AsyncClient) -> None:
    wrong = {}
    for name, bad in BAD_FIELDS.items():
        refusal = await refusal_of(client, bad.message)
        fields = [bad.field] if bad.field else []
        if (refusal.code, refusal.reason, refusal.fields) != (bad.code, bad.reason, fields):
            wrong[name] = (refusal.code, refusal.reason, refusal.fields)
        assert refusal.error is not None
        assert len(str(refusal.error)) < 500, f"{name}: the answer repeats what was sent"
    assert not wrong


async def test_all_bad_fields_are_named_at_once(client: AsyncClient) -> None:
    refusal = await refusal_of(client, config(temperature=-1.0, top_p=3.0, num_outputs=99, stop=[""]))
    assert refusal.fields == ["config.temperature", "config.top_p", "config.num_outputs", "config.stop"]


@pytest.mark.row(54, 55)
async def test_odd_text_is_plain_text(client: AsyncClient) -> None:
    odd = ["nul \0 inside", "<eos><bos><|im_end|>", "\u202eright to left\u202c", "\ufffd\ufffe\uffff", "e\u0301" * 40]
    for text in odd:
        outcome = await Outcome(client.stream(text, model=MODEL, max_tokens=2)).read()
        assert outcome.finished is not None
        assert outcome.finished.usage.prompt_tokens == len(text.encode()), "a token for each byte, none of control"


# -- bytes ------------------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    out = b""
    while number >= 0x80:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field on the wire."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def nested(depth: int) -> bytes:
    """Groups of an unknown field within each other."""
    return varint(99 << 3 | 3) * depth + varint(99 << 3 | 4) * depth


async def raw(system: System, data: bytes, method: str = "GenerationService/StreamGenerate") -> RelayError:
    """Send bytes as a request and return what they are refused with."""
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(system.gateways[0].address, options=options) as channel:
        call = channel.unary_stream(f"/torchrelay.v1.{method}")(
            data, metadata=[("authorization", f"Bearer {system.key}")], timeout=20
        )
        with refused() as refusal:
            async for _ in call:
                pass
    assert refusal.error is not None
    return refusal.error


@pytest.mark.row(28, 29, 30)
async def test_bytes_that_are_no_message_are_refused(system: System, client: AsyncClient) -> None:
    good = request().SerializeToString()
    rng = random.Random(1)
    for data in (
        good[:-1],
        b"\xff" * 100,
        field(1, b"\xc3\x28"),  # a string that is not UTF-8
        field(2, field(1, b"\xed\xa0\x80")),  # a lone surrogate
        nested(101),
        nested(5000),
        field(2, b"") * 10 + b"\x0a\x7f",
    ):
        error = await raw(system, data)
        assert (error.code, error.reason) == (INVALID, "MALFORMED_MESSAGE"), data[:20]
    for _ in range(50):
        error = await raw(system, rng.randbytes(rng.randrange(1, 200)))
        assert error.code in (INVALID, NOT_FOUND), error
        assert error.reason in ("MALFORMED_MESSAGE", "UNKNOWN_FIELD", REQUIRED, "MODEL_NOT_FOUND"), error


@pytest.mark.row(21, 25, 26)
async def test_unknown_fields_are_refused_by_number_wherever_they_stand(system: System, client: AsyncClient) -> None:
    good = request().SerializeToString()
    for data, path in (
        (good + field(200, b"x"), "200"),
        (good + nested(50), "99"),
        (good + field(3, field(77, b"x")), "config.77"),
        (good + field(2, field(3, field(1, field(2, field(9, b"x"))))), "input.chat.messages[0].parts[0].9"),
    ):
        error = await raw(system, data)
        assert (error.code, error.reason) == (INVALID, "UNKNOWN_FIELD")
        assert [violation.field for violation in error.violations] == [path]


@pytest.mark.row(12)
async def test_of_two_inputs_the_last_counts_as_protobuf_has_it(system: System, client: AsyncClient) -> None:
    both = field(1, MODEL.encode()) + field(2, field(1, b"text") + field(2, field(1, varint(300))))
    error = await raw(system, both)
    assert (error.code, error.reason) == (INVALID, RANGE)
    assert [violation.field for violation in error.violations] == ["input.token_ids.ids"]


@pytest.mark.row(27, 31)
async def test_message_over_the_limit_is_refused_and_a_large_one_within_it_is_bounded(
    system: System, client: AsyncClient
) -> None:
    error = await raw(system, field(1, b"x" * (5 << 20)))
    assert error.code is EXHAUSTED
    assert error.reason == ""
    process = system.gateways[0].process
    assert process is not None
    before = resident_bytes(process.pid)
    ids = varint(5) * 4_100_000
    error = await raw(system, field(1, MODEL.encode()) + field(2, field(2, field(1, ids))))
    assert (error.code, error.reason) == (INVALID, TOO_LONG)
    assert resident_bytes(process.pid) - before < 300 << 20


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.row(35)
async def test_unknown_methods_are_unimplemented(system: System, client: AsyncClient) -> None:
    for method in ("GenerationService/Nothing", "NoService/Generate"):
        assert (await raw(system, b"", method)).code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.row(60)
async def test_other_protocols_are_hung_up_on(system: System, client: AsyncClient) -> None:
    host, port = system.gateways[0].address.split(":")
    for data in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(200),
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        await writer.drain()
        try:
            await asyncio.wait_for(reader.read(), 20)
        except ConnectionResetError:
            pass
        finally:
            writer.close()
    with socket.create_connection((host, int(port))):
        pass  # one that says nothing and goes


# -- resume, cancel, get ----------------------------------------------------------------------------------------------


@pytest.mark.row(40)
async def test_generations_of_others_and_made_up_ones_do_not_exist(
    system: System, client: AsyncClient, other_key: str
) -> None:
    mine = (await Outcome(client.stream("mine", model=MODEL, max_tokens=2)).read()).generation_id
    shard, _, random_part = mine.partition(".")
    unknown = f"{shard}.{random_part[::-1]}"
    errors = set()
    async with system.client(key=other_key) as other:
        for caller, generation_id in (
            (other, mine),
            (client, unknown),
            (client, "nothing"),
            (client, "keys.aaaaaaaaaaaaaaaaaaaaaaaaaa"),
            (client, "x" * 10_000),
            (client, f"{shard}.\r\nFLUSHALL"),
        ):
            generation, metadata = caller.generation, caller.metadata
            with refused() as resume:
                call = generation.ResumeGeneration(
                    pb.ResumeGenerationRequest(generation_id=generation_id), metadata=metadata
                )
                await Outcome(events_of(call)).read()
            with refused() as get:
                await generation.GetGeneration(pb.GetGenerationRequest(generation_id=generation_id), metadata=metadata)
            with refused() as cancel:
                await generation.CancelGeneration(
                    pb.CancelGenerationRequest(generation_id=generation_id), metadata=metadata
                )
            errors |= {refusal.summary for refusal in (resume, get, cancel)}
    assert len(errors) == 1, "one answer for all"
    assert next(iter(errors))[:2] == (NOT_FOUND, "REQUEST_NOT_FOUND")
    assert (await client.get(mine)).state == pb.GENERATION_STATE_FINISHED
    for call in (
        client.generation.GetGeneration(pb.GetGenerationRequest(), metadata=client.metadata),
        client.generation.CancelGeneration(pb.CancelGenerationRequest(), metadata=client.metadata),
    ):
        with refused() as refusal:
            await call
        assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, REQUIRED, ["generation_id"])


@pytest.mark.row(41, 42)
async def test_resume_outside_the_log_is_refused(client: AsyncClient) -> None:
    outcome = await Outcome(client.stream("mine", model=MODEL, max_tokens=2)).read()

    async def resume(**fields: Any) -> Refusal:
        wish = pb.ResumeGenerationRequest(generation_id=outcome.generation_id, **fields)
        with refused() as refusal:
            call = client.generation.ResumeGeneration(wish, metadata=client.metadata)
            await Outcome(events_of(call)).read()
        return refusal

    beyond = await resume(after_sequence=outcome.sequence + 1)
    assert (beyond.code, beyond.reason) == (grpc.StatusCode.OUT_OF_RANGE, "INDEX_OUT_OF_RANGE")
    absurd = await resume(after_sequence=2**64 - 1)
    assert (absurd.code, absurd.reason) == (grpc.StatusCode.OUT_OF_RANGE, "INDEX_OUT_OF_RANGE")
    foreign = await resume(after_sequence=1, chain_hash=b"12345678")
    assert (foreign.code, foreign.reason) == (grpc.StatusCode.ABORTED, "RESULT_LOST")
    lost = await resume(after_sequence=outcome.sequence + 5, chain_hash=b"12345678")
    assert (lost.code, lost.reason) == (grpc.StatusCode.ABORTED, "RESULT_LOST")
    short = await resume(after_sequence=1, chain_hash=b"123")
    assert (short.code, short.reason, short.fields) == (INVALID, WRONG, ["chain_hash"])


# -- full queues ------------------------------------------------------------------------------------------------------


@pytest.mark.row(45, 46)
async def test_full_queue_refuses_and_says_when_to_come_again(
    system: System, client: AsyncClient, other_key: str
) -> None:
    async def submit(caller: AsyncClient) -> str:
        wish = pb.SubmitGenerationRequest(model=COLD, input=pb.GenerationInput(text="hello"))
        response = await caller.generation.SubmitGeneration(wish, metadata=caller.metadata)
        return response.accepted.generation_id

    async with system.client(key=other_key) as other:
        mine = [await submit(client), await submit(client)]
        with refused() as tenant_full:
            await submit(client)
        others = [await submit(other)]
        with refused() as full:
            await submit(other)
        for refusal, reason in ((tenant_full, "TENANT_QUEUE_FULL"), (full, "QUEUE_FULL")):
            assert (refusal.code, refusal.reason) == (EXHAUSTED, reason)
            assert refusal.error is not None
            assert refusal.error.retry_delay_s is not None
            assert 0 < refusal.error.retry_delay_s < 60
        for caller, generation_ids in ((client, mine), (other, others)):
            for generation_id in generation_ids:
                assert await caller.cancel(generation_id) == pb.GENERATION_STATE_CANCELLED

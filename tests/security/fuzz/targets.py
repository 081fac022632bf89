"""What is fuzzed: each target takes any bytes and raises only where a law is broken.

They need no fuzzer: the kept corpus is replayed through them as ordinary tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from google.protobuf.message import Message

from common import records
from common.api_keys import digest_of, id_of
from common.errors import SealBroken, ServingError, Unauthenticated
from common.generation import EventBody, JobBody
from common.jobs import ItemKind
from gateway import validation as check
from gateway.conversation import conversation_of
from gateway.identity.api_key import api_key_of
from gateway.interceptors.guard import parse
from torchrelay.admin.v1beta1 import api_key_pb2, fleet_pb2, tenant_pb2, usage_pb2
from torchrelay.v1 import generation_pb2, model_pb2

Target = Callable[[bytes], None]

_CONTEXT: Final = 2048
_VOCAB: Final = 1000
_LIMITS: Final = check.ConfigLimits(context_length=_CONTEXT, vocab_size=_VOCAB, max_outputs=8, max_stop_strings=8)


def _request_types() -> tuple[type[Message], ...]:
    """The request message of every method of every service, by name, so that a kept input keeps its meaning."""
    found: dict[str, type[Message]] = {}
    for module in (generation_pb2, model_pb2, api_key_pb2, fleet_pb2, tenant_pb2, usage_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                found[method.input_type.full_name] = method.input_type._concrete_class
    return tuple(found[name] for name in sorted(found))


REQUEST_TYPES: Final = _request_types()


def parser(data: bytes) -> None:
    """Bytes of a request, of the type that the first one names, become a message or InvalidRequest; so do its fields.

    A message that was taken is written and read back the same.
    """
    kind = REQUEST_TYPES[data[0] % len(REQUEST_TYPES)] if data else REQUEST_TYPES[0]
    try:
        message = parse(kind.FromString, data[1:])
        written = message.SerializeToString(deterministic=True)
        again = parse(kind.FromString, written).SerializeToString(deterministic=True)
        _validate(message)
    except ServingError as error:
        _check_refusal(error)
        return
    assert again == written, "a message changes when it is read back"


def _check_refusal(error: ServingError) -> None:
    assert error.reason, "a refusal without a reason"
    assert str(error), "a refusal without words"


def _validate(message: Any) -> None:
    """What the handlers ask of a request's fields. Raises InvalidRequest."""
    names = {field.name for field in message.DESCRIPTOR.fields}
    if "model" in names:
        check.check_model_name(message.model)
    if "idempotency_key" in names:
        check.check_idempotency_key(message.idempotency_key)
    for name in ("time_limit", "disconnect_grace"):
        if name in names:
            value = check.milliseconds(getattr(message, name), name, minimum=0, maximum=10**9)
            assert 0 <= value <= 10**9
    num_tokens = 1
    if "input" in names:
        num_tokens = _validate_input(message.input)
    if "config" in names:
        defaults = generation_pb2.GenerationConfig(temperature=0.5, max_tokens=16, num_outputs=1)
        config = check.resolve_config(message.config, defaults, num_tokens, _LIMITS, seed=1)
        params = check.sampling_params(config, (2,))
        assert 1 <= params.max_tokens <= _CONTEXT - num_tokens
        assert 1 <= params.num_outputs <= _LIMITS.max_outputs
        assert 0 <= params.temperature <= check.MAX_TEMPERATURE
        assert 0 < params.top_p <= 1
        assert 0 <= params.min_p < 1
        assert 0 < params.repetition_penalty <= check.MAX_REPETITION_PENALTY
        assert len(params.stop_strings) <= _LIMITS.max_stop_strings
        # The worker gets what was asked for.
        body = JobBody(prompt_token_ids=(1,), sampling=params)
        assert _BODY.decode(records.encode_body(body)) == body


def _validate_input(source: generation_pb2.GenerationInput) -> int:
    if source.WhichOneof("input") == "chat":
        conversation = conversation_of(source.chat)
        assert conversation.messages
        assert {message.role for message in conversation.messages} <= {"system", "user", "assistant", "tool"}
        assert not conversation.must_call or conversation.tools
    if source.WhichOneof("input") == "token_ids":
        check.check_token_ids(source.token_ids.ids, _VOCAB, "input.token_ids.ids")
        return max(1, len(source.token_ids.ids))
    return 1


_BODY: Final = msgspec.msgpack.Decoder(JobBody)
_EVENT_BODY: Final = msgspec.msgpack.Decoder(EventBody)


def codec(data: bytes) -> None:
    """Bodies, log entries, reply items and claims of any bytes are read, or are a msgspec.DecodeError.

    What was read is written and read back the same.
    """
    if not data:
        return
    kind, rest = data[0] % 5, data[1:]
    try:
        (_job_body, _entry, _items, _claim, _event_body)[kind](rest)
    except (msgspec.DecodeError, SealBroken):
        return


def _job_body(data: bytes) -> None:
    body = records.decode(_BODY, data)
    # Compared as bytes, since a float may be no number, which equals nothing.
    written = records.encode_body(body)
    assert records.encode_body(_BODY.decode(written)) == written


def _event_body(data: bytes) -> None:
    body = records.decode(_EVENT_BODY, data)
    entry = records.encode_entry(bytes(8), 1, 2, body)
    event = records.event_from_fields([b"e", entry])
    assert isinstance(event.body, EventBody)
    assert (event.chain_hash, event.epoch, event.sequence) == (bytes(8), 1, 2)
    assert records.encode_entry(bytes(8), 1, 2, event.body) == entry


def _entry(data: bytes) -> None:
    event = records.event_from_fields([b"e", data])
    if isinstance(event.body, EventBody):
        written = records.encode_entry(event.chain_hash, event.epoch, event.sequence, event.body)
        assert records.encode_entry(*_fields_of(written)) == written
    ended = records.event_from_fields([b"e", data, b"k", b"D", b"y", b""])
    assert ended.kind is ItemKind.DONE


def _fields_of(written: bytes) -> tuple[bytes, int, int, EventBody]:
    event = records.event_from_fields([b"e", written])
    assert isinstance(event.body, EventBody)
    return event.chain_hash, event.epoch, event.sequence, event.body


def _items(data: bytes) -> None:
    for item in records.items_from_entry(data):
        assert isinstance(item.kind, ItemKind)
        assert isinstance(item.generation_id, str)


def _claim(data: bytes) -> None:
    """A job body and one log entry, as a script answers a claim: both are bytes that other processes wrote."""
    cut = data[0] if data else 0
    body, entry = data[1 : 1 + cut], data[1 + cut :]
    log = [[b"1-1", [b"e", entry]]]
    reply = [b"m.id", 1, 0, bytes(8), 1000, 1, 0, b"tenant", 0, 0, 0, 0, 0, body, log, b"1", 0, 0, 50, 1]
    assert records.claim_head(reply).generation_id == "m.id"
    assert records.job_from_reply(reply).generation_id == "m.id"


def credentials(data: bytes) -> None:
    """Metadata of any bytes gives one key or Unauthenticated; a key gives an id only if it is well-formed."""
    metadata: list[tuple[str, str | bytes]] = []
    for number, line in enumerate(data.split(b"\n")):
        name, _, value = line.partition(b":")
        text = _text(name).lower() or ("authorization", "x-api-key")[number % 2]
        metadata.append((text, value if text.endswith("-bin") else _text(value)))
    try:
        key = api_key_of(metadata)
    except Unauthenticated as error:
        _check_refusal(error)
        return
    if not key:
        return
    assert any(isinstance(value, str) and key in value for _, value in metadata)
    digest_of(key)
    key_id = id_of(key)
    if key_id is not None:
        assert key.isascii()
        assert key.startswith(f"tr_{key_id}_")
        assert len(key) == 66
        assert id_of(key[:-1]) is None
        assert id_of(key + "x") is None


def _text(value: bytes) -> str:
    """A metadata value as the server's library gives it."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


TARGETS: Final[Mapping[str, Target]] = {"parser": parser, "codec": codec, "credentials": credentials}

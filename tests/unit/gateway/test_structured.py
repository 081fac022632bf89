"""Constraints at the door: compiled beside the event loop, once, and refused with the field that is wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import gateway.structured
from common.errors import FailedPrecondition, InvalidRequest
from common.generation import GrammarKind, StructuredOutput
from common.jobs import Reason
from gateway.structured import StructuredOutputs, failed, spec_of
from gateway.turns import TenantTurns
from tests.builders_models import VOCAB_SIZE, write_tokenizer
from torchrelay.v1 import generation_pb2 as pb

GOOD = pb.StructuredOutput(regex="a+")


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> bytes:
    write_tokenizer(tmp_path)
    return (tmp_path / "tokenizer.json").read_bytes()


@pytest.fixture
def outputs(tokenizer_json: bytes) -> StructuredOutputs:
    return StructuredOutputs(tokenizer_json, VOCAB_SIZE, (2,))


@pytest.mark.parametrize(
    ("message", "spec"),
    [
        (pb.StructuredOutput(json_object=pb.JsonObject()), StructuredOutput(GrammarKind.JSON_OBJECT)),
        (pb.StructuredOutput(json_schema="{}"), StructuredOutput(GrammarKind.JSON_SCHEMA, "{}")),
        (pb.StructuredOutput(regex=""), StructuredOutput(GrammarKind.REGEX, "")),
        (
            pb.StructuredOutput(choices=pb.Choices(values=["é", "b"])),
            StructuredOutput(GrammarKind.CHOICES, choices=("é", "b")),
        ),
        (pb.StructuredOutput(grammar='start: "a"'), StructuredOutput(GrammarKind.LARK, 'start: "a"')),
    ],
)
async def test_every_kind_reaches_the_worker(
    outputs: StructuredOutputs, message: pb.StructuredOutput, spec: StructuredOutput
) -> None:
    assert spec_of(message) == spec
    await outputs.check(message, TenantTurns(), "t")


async def test_what_passed_is_not_compiled_again(outputs: StructuredOutputs, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[StructuredOutput] = []
    compile_grammar = gateway.structured.compile_grammar

    def counted(spec: StructuredOutput, tokenizer: Any) -> Any:
        compiled.append(spec)
        return compile_grammar(spec, tokenizer)

    monkeypatch.setattr(gateway.structured, "compile_grammar", counted)
    bad = pb.StructuredOutput(regex="(")
    for _ in range(3):
        await outputs.check(GOOD, TenantTurns(), "t")
        with pytest.raises(InvalidRequest):
            await outputs.check(bad, TenantTurns(), "t")
    assert [spec.text for spec in compiled] == ["a+", "(", "(", "("]


async def test_one_tenants_slow_grammars_wait_for_each_other_alone(outputs: StructuredOutputs) -> None:
    """Each takes some fifty milliseconds in a thread; the event loop and another tenant go on meanwhile."""
    turns = TenantTurns()
    await outputs.check(GOOD, turns, "t")  # the tokenizer is ready
    slow = [pb.StructuredOutput(regex=rf"(\pL+){{{i}}}" + r"\pL+" * 1500) for i in range(1, 9)]
    finished: list[str] = []

    async def check(message: pb.StructuredOutput, tenant: str) -> None:
        await outputs.check(message, turns, tenant)
        finished.append(tenant)

    await asyncio.gather(
        *(check(message, "many") for message in slow), check(pb.StructuredOutput(regex="quick"), "other")
    )
    assert finished.index("other") < len(slow)
    assert not len(turns)


@pytest.mark.parametrize(("eos_token_ids", "broken"), [((), False), ((2,), True)])
async def test_a_model_that_cannot_be_constrained_says_so(
    tokenizer_json: bytes, eos_token_ids: tuple[int, ...], broken: bool
) -> None:
    content = tokenizer_json.replace(b'"ByteLevel"', b'"WordPiece"') if broken else tokenizer_json
    outputs = StructuredOutputs(content, VOCAB_SIZE, eos_token_ids)
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as raised:
            await outputs.check(GOOD, TenantTurns(), "t")
        assert raised.value.reason == "STRUCTURED_OUTPUT_UNSUPPORTED"


def test_every_failure_of_a_grammar_has_its_words() -> None:
    for reason in Reason:
        if reason.is_of_grammar and reason is not Reason.STRUCTURED_OUTPUT_UNSUPPORTED:
            error = failed(reason, pb.GenerationConfig(structured_output=GOOD))
            assert (error.reason, error.violations[0].field) == (str(reason), "config.structured_output")

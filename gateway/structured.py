"""Structured output at the door: from a request's message to what workers follow, compiled once to see that it can be.

Compiling takes milliseconds, and up to some hundred for what is made to take long. So it is done in a thread, without
the interpreter's lock, one at a time for each tenant; what has passed is remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import msgspec

from common.errors import FailedPrecondition, InvalidRequest
from common.generation import GrammarKind, StructuredOutput
from common.jobs import Reason
from common.structured import GrammarError, check_size, compile_grammar, make_tokenizer
from gateway.turns import TenantTurns
from torchrelay.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from llguidance import LLTokenizer

FIELD: Final = "config.structured_output"
TOOLS_FIELD: Final = "input.chat.tools"
_MAX_PASSED: Final = 4096
_KINDS: Final = {
    "json_object": GrammarKind.JSON_OBJECT,
    "json_schema": GrammarKind.JSON_SCHEMA,
    "regex": GrammarKind.REGEX,
    "choices": GrammarKind.CHOICES,
    "grammar": GrammarKind.LARK,
}
_FAILURES: Final = {
    Reason.GRAMMAR_INVALID: "the workers of this model cannot compile it",
    Reason.GRAMMAR_TOO_COMPLEX: "it takes more work per token than a request may cause",
    Reason.GRAMMAR_STUCK: "the output came to where it allows no token of the model",
}


def unsupported() -> FailedPrecondition:
    """The model cannot be constrained."""
    return FailedPrecondition(
        "the model's tokenizer or workers do not allow for structured output", reason="STRUCTURED_OUTPUT_UNSUPPORTED"
    )


def failed(reason: Reason, config: pb.GenerationConfig) -> InvalidRequest:
    """The generation ended by its grammar. Where its config asks for none, its conversation's tools brought it."""
    field = FIELD if config.HasField("structured_output") else TOOLS_FIELD
    return InvalidRequest(f"{field}: {_FAILURES[reason]}", reason=str(reason), field=field)


def spec_of(message: pb.StructuredOutput) -> StructuredOutput:
    """Return a constraint as workers take it. Raises InvalidRequest for one that is not even looked at."""
    name = message.WhichOneof("kind")
    if name is None:
        kinds = ", ".join(_KINDS)
        raise InvalidRequest(f"{FIELD}: one of {kinds} is required", reason="FIELD_REQUIRED", field=FIELD)
    kind, field = _KINDS[name], f"{FIELD}.{name}"
    if kind is GrammarKind.JSON_OBJECT:
        return StructuredOutput(kind)
    if kind is GrammarKind.CHOICES:
        spec = StructuredOutput(kind, choices=tuple(message.choices.values))
        if not spec.choices or not all(spec.choices):
            field = f"{field}.values"
            raise InvalidRequest(
                f"{field}: at least one is required, and none may be empty", reason="FIELD_REQUIRED", field=field
            )
    else:
        spec = StructuredOutput(kind, getattr(message, name))
    try:
        check_size(spec)
    except GrammarError as error:
        raise _invalid(field, error) from error
    return spec


class StructuredOutputs:
    """Checks constraints for one model."""

    def __init__(self, tokenizer_json: bytes, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """The tokenizer is taken apart when the first constraint comes: it takes half a second and some MiB."""
        self._files = tokenizer_json, vocab_size, eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._is_unsupported = False
        self._making = asyncio.Lock()
        self._passed: OrderedDict[bytes, None] = OrderedDict()

    async def check(self, message: pb.StructuredOutput, turns: TenantTurns, tenant: str) -> StructuredOutput:
        """Return the constraint as workers take it.

        Raises InvalidRequest with what is wrong, FailedPrecondition if the model cannot be constrained.
        """
        spec = spec_of(message)
        try:
            await self.compile(spec, turns, tenant)
        except GrammarError as error:
            raise _invalid(f"{FIELD}.{message.WhichOneof('kind')}", error) from error
        return spec

    async def compile(self, spec: StructuredOutput, turns: TenantTurns, tenant: str) -> None:
        """Raise GrammarError for a constraint that cannot be kept to, FailedPrecondition if none can."""
        digest = hashlib.sha256(msgspec.msgpack.encode(spec)).digest()
        if digest in self._passed:
            self._passed.move_to_end(digest)
            return
        tokenizer = await self._get_tokenizer()
        await turns.run(tenant, lambda: compile_grammar(spec, tokenizer))
        self._passed[digest] = None
        while len(self._passed) > _MAX_PASSED:
            self._passed.popitem(last=False)

    async def _get_tokenizer(self) -> LLTokenizer:
        async with self._making:  # those that waited find what the first one has made
            if self._tokenizer is None and not self._is_unsupported:
                try:
                    self._tokenizer = await asyncio.to_thread(make_tokenizer, *self._files)
                except ValueError:
                    self._is_unsupported = True
        if self._tokenizer is None:
            raise unsupported()
        return self._tokenizer


def _invalid(field: str, error: GrammarError) -> InvalidRequest:
    return InvalidRequest(f"{field}: {error}", reason=error.reason, field=field)

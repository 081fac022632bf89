"""Structured output by llguidance: what the engine asks of `engine/grammar.py`."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence as Rows
from typing import Final

import msgspec
import numpy as np
import structlog
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from common.generation import StructuredOutput
from common.structured import JSON_KINDS, GrammarError, compile_grammar, failure_reason, make_tokenizer
from worker.engine.grammar import GrammarFailure, Matcher, TokenMask

log = structlog.get_logger()

MAX_NUMBER_CHARS: Final = 24
_MAX_GRAMMARS: Final = 64  # kept compiled, each of some MiB at most
_NUMBER: Final = frozenset(b"0123456789.eE+-")


def make_compiler(tokenizer_json: bytes, vocab_size: int, eos_token_ids: Rows[int]) -> LlguidanceCompiler | None:
    """Return what compiles constraints for a model; None, and a line of log, if its tokenizer does not allow for it."""
    try:
        return LlguidanceCompiler(make_tokenizer(tokenizer_json, vocab_size, eos_token_ids))
    except ValueError as error:
        log.warning("structured_output.unavailable", reason=str(error))
        return None


class NumberTokens:
    """The tokens of a model as bytes, as far as numbers need them."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        """Looks at the whole vocabulary, which no step may have to wait for: 30 ms for 50,000 tokens."""
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self.no_digits: Final = self._mask_of_no_digits()

    def of(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._tokenizer.decode_bytes([token_id])
        return found

    def _mask_of_no_digits(self) -> TokenMask:
        """Return the mask [words] of all tokens that do not begin with a digit."""
        vocab_size = self._tokenizer.vocab_size
        bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
        bits[:vocab_size] = [not self._tokenizer.decode_bytes([i])[:1].isdigit() for i in range(vocab_size)]
        return np.packbits(bits, bitorder="little").view(np.int32)


class NumberLength:
    """How many characters of a number JSON text ends in."""

    def __init__(self) -> None:
        self.num_chars = 0
        self._in_string = False
        self._escaped = False

    def push(self, piece: bytes) -> None:
        for byte in piece:
            if self._in_string:
                self._in_string = self._escaped or byte != 0x22
                self._escaped = not self._escaped and byte == 0x5C
            else:
                self._in_string = byte == 0x22
                self.num_chars = self.num_chars + 1 if byte in _NUMBER else 0


class LlguidanceMatcher:
    """Follows one output. Not thread-safe."""

    def __init__(self, matcher: LLMatcher, tokens: NumberTokens, number: NumberLength | None) -> None:
        self.inner = matcher
        self._tokens = tokens
        self._number = number  # of JSON alone: what a grammar of the caller's own allows is the caller's business
        self.failure: str | None = None

    @property
    def is_complete(self) -> bool:
        return self.failure is None and self.inner.is_stopped() and self.inner.is_accepting()

    def push(self, token_id: int) -> None:
        if not self.inner.consume_token(token_id):
            self.note_failure("GRAMMAR_STUCK")  # the sampler takes a forbidden token only where all are
            raise GrammarFailure(self.failure)
        if self._number is not None:
            self._number.push(self._tokens.of(token_id))

    def note_failure(self, otherwise: str) -> None:
        """Say why it follows no further."""
        reason = failure_reason(self.inner.get_error())
        self.failure = reason if reason == "GRAMMAR_TOO_COMPLEX" else otherwise

    def check_mask(self, mask: TokenMask) -> None:
        """Finish the mask [words] that the library has written."""
        if self.inner.is_error():
            self.note_failure("GRAMMAR_STUCK")
        elif self._number is not None and self._number.num_chars >= MAX_NUMBER_CHARS:
            # Only where something else may come: a bound may ask for more digits.
            ended = mask & self._tokens.no_digits[: len(mask)]
            if ended.any():
                mask[:] = ended


class LlguidanceGrammar:
    """A compiled constraint: a matcher that stays at the beginning and is copied."""

    def __init__(self, matcher: LLMatcher, tokens: NumberTokens, *, is_json: bool) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._is_json = is_json

    def matcher(self) -> LlguidanceMatcher:
        return LlguidanceMatcher(self._matcher.deep_copy(), self._tokens, NumberLength() if self._is_json else None)


class LlguidanceCompiler:
    """Compiles constraints for one model and keeps those used last."""

    def __init__(self, tokenizer: LLTokenizer, num_threads: int = 1) -> None:
        """`num_threads` fill the masks of a step together."""
        self._tokenizer = tokenizer
        self._tokens = NumberTokens(tokenizer)
        self._executor = LLExecutor(num_threads)
        self._num_words = -(-tokenizer.vocab_size // 32)
        self._grammars: OrderedDict[bytes, LlguidanceGrammar] = OrderedDict()
        self._lock = threading.Lock()  # around the dictionary, never while something compiles

    def compile(self, spec: StructuredOutput) -> LlguidanceGrammar:
        key = hashlib.sha256(msgspec.msgpack.encode(spec)).digest()
        with self._lock:
            known = self._grammars.get(key)
            if known is not None:
                self._grammars.move_to_end(key)
                return known
        try:
            matcher = compile_grammar(spec, self._tokenizer)
        except GrammarError as error:
            raise GrammarFailure(error.reason) from error
        grammar = LlguidanceGrammar(matcher, self._tokens, is_json=_is_json(spec))
        with self._lock:
            self._grammars[key] = grammar
            while len(self._grammars) > _MAX_GRAMMARS:
                self._grammars.popitem(last=False)
        return grammar

    def fill(self, matchers: Rows[Matcher], masks: TokenMask) -> None:
        assert masks.flags.c_contiguous
        assert masks.shape == (len(matchers), self._num_words)
        own = [matcher for matcher in matchers if isinstance(matcher, LlguidanceMatcher)]
        assert len(own) == len(matchers), "a matcher of another library"
        numbered = [(matcher.inner, i) for i, matcher in enumerate(own)]
        # Does not hold the interpreter's lock. Failures raise nothing: each matcher tells of its own.
        self._executor.unsafe_compute_mask_ptr(numbered, masks.ctypes.data, masks.shape[1] * 4, len(own))
        for matcher, mask in zip(own, masks, strict=True):
            matcher.check_mask(mask)


def _is_json(spec: StructuredOutput) -> bool:
    """Whether all of the text is JSON, so that its numbers are known from its strings."""
    if spec.reasoning_format:
        return False
    return spec.kind in JSON_KINDS or (spec.tools is not None and spec.tools.must_call)

"""Structured output in the engine: masks, takeovers, preemption, ends and failures; numbers that end."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation import FinishReason, GrammarKind, SamplingParams, StructuredOutput
from tests.builders_engine import Collected, Driver, PaperRunner, generate, make_request, make_sequence, make_settings
from tests.builders_models import VOCAB_SIZE, write_tokenizer
from worker.engine.grammar import Grammar, GrammarFailure, Matcher, TokenMask, TokenMasks
from worker.engine.loop import Engine
from worker.engine.sampler import Sampler
from worker.engine.thread import EngineThread
from worker.engine.types import GenerationRequest
from worker.structured import (
    MAX_NUMBER_CHARS,
    LlguidanceCompiler,
    LlguidanceMatcher,
    NumberLength,
    NumberTokens,
    make_compiler,
)

EOS = 2
CPU = torch.device("cpu")
LONG = StructuredOutput(GrammarKind.REGEX, "([a-f]{3}-){6}[a-f]{3}")


class Bytes:
    """A detokenizer of the tokenizer of these tests, whose ids are bytes behind three control tokens."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names

    def push(self, token_id: int) -> str:
        return self._names.get(token_id, f"<{token_id}>")

    def flush(self) -> str:
        return ""


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return (folder / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def compiler(tokenizer_json: bytes) -> LlguidanceCompiler:
    made = make_compiler(tokenizer_json, VOCAB_SIZE, (EOS,))
    assert made is not None
    return made


@pytest.fixture(scope="module")
def names(tokenizer_json: bytes) -> dict[int, str]:
    vocabulary: dict[str, int] = json.loads(tokenizer_json)["model"]["vocab"]
    return {token_id: name.replace("Ġ", " ") for name, token_id in vocabulary.items() if len(name) == 1}


def make_engine(
    names: dict[int, str], grammars: Any, num_blocks: int = 65, **changes: Any
) -> tuple[Engine, PaperRunner]:
    runner = PaperRunner(num_blocks, max_model_len=200, vocab_size=VOCAB_SIZE)
    limits = make_settings(**{"max_num_seqs": 8, "token_budget": 16, **changes})
    return Engine(runner, limits, lambda: Bytes(names), grammars=grammars), runner


def constrained(
    request_id: str, spec: StructuredOutput, prompt: Sequence[int] = (3, 4, 5), **fields: Any
) -> GenerationRequest:
    fields = {"max_tokens": 60, "stop_token_ids": (EOS,), **fields}
    return make_request(request_id, prompt, structured_output=spec, **fields)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_matches_beside_unconstrained_ones(
    names: dict[int, str], compiler: LlguidanceCompiler, temperature: float
) -> None:
    free = make_request("free", (5, 6, 7), temperature=temperature, max_tokens=20)
    alone = generate(make_engine(names, compiler)[0], free)["free"]
    engine, _ = make_engine(names, compiler)
    several = constrained("n", LONG, temperature=temperature, num_outputs=3, top_k=5)
    results = generate(engine, several, constrained("one", LONG, (9, 9)), free)
    for text in (*results["n"].texts, *results["one"].texts):
        assert re.fullmatch(LONG.text, text)
    assert results["n"].reasons == [FinishReason.STOP] * 3
    assert results["n"].stop_matches == [None] * 3
    assert results["free"].tokens == alone.tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_takeover_at_every_token_goes_on_the_same(
    names: dict[int, str], compiler: LlguidanceCompiler, temperature: float
) -> None:
    wanted = {"temperature": temperature, "seed": 3}
    whole = generate(make_engine(names, compiler)[0], constrained("w", LONG, **wanted))["w"]
    assert len(whole.tokens[0]) == 27
    for cut in range(1, 28):
        request = constrained("t", LONG, emitted=(tuple(whole.tokens[0][:cut]),), **wanted)
        resumed = generate(make_engine(names, compiler)[0], request)["t"]
        assert (resumed.tokens, resumed.reasons) == (whole.tokens, [FinishReason.STOP]), cut


def test_preemption_goes_on_the_same(names: dict[int, str], compiler: LlguidanceCompiler) -> None:
    requests = [constrained(f"r{i}", LONG, (i + 3, 4, 5), temperature=1.0, seed=i) for i in range(4)]
    roomy = generate(make_engine(names, compiler)[0], *requests)
    engine, _ = make_engine(names, compiler, num_blocks=17)
    tight = generate(engine, *requests)
    assert engine.stats().num_preemptions > 0
    assert {name: found.tokens for name, found in tight.items()} == {name: f.tokens for name, f in roomy.items()}


def test_a_step_out_of_memory_leaves_the_matcher_as_it_was(names: dict[int, str], compiler: LlguidanceCompiler) -> None:
    engine, runner = make_engine(names, compiler)
    runner.fail_steps = {5}
    assert re.fullmatch(LONG.text, generate(engine, constrained("r", LONG))["r"].texts[0])


def test_stop_strings_and_length_cut_it(names: dict[int, str], compiler: LlguidanceCompiler) -> None:
    engine, _ = make_engine(names, compiler)
    results = generate(
        engine, constrained("stop", LONG, stop_strings=("-",)), constrained("length", LONG, (8, 8), max_tokens=5)
    )
    assert (len(results["stop"].texts[0]), results["stop"].reasons) == (3, [FinishReason.STOP])
    assert (len(results["length"].texts[0]), results["length"].reasons) == (5, [FinishReason.LENGTH])


def test_constrained_sequences_do_not_draft(names: dict[int, str], compiler: LlguidanceCompiler) -> None:
    engine, runner = make_engine(names, compiler, speculation=True)
    repetitive = [7, 8, 9] * 8
    generate(engine, constrained("r", LONG, repetitive))
    assert runner.num_draft_rows == 0


def test_what_cannot_go_on_fails_alone_and_by_name(names: dict[int, str], compiler: LlguidanceCompiler) -> None:
    wide = StructuredOutput(GrammarKind.LARK, "start: any+\nany: " + " | ".join(f'"{i}x"' for i in range(3000)))
    bad = {
        "stuck": (
            constrained("stuck", StructuredOutput(GrammarKind.REGEX, "aaaa"), no_repeat_ngram_size=1),
            "ALL_TOKENS_FORBIDDEN",
        ),
        "wide": (constrained("wide", wide), "GRAMMAR_TOO_COMPLEX"),
        "invalid": (constrained("invalid", StructuredOutput(GrammarKind.REGEX, "(")), "GRAMMAR_INVALID"),
        "log": (constrained("log", LONG, emitted=((100, 101),)), "GRAMMAR_STUCK"),
    }
    engine, _ = make_engine(names, compiler)
    results = generate(engine, constrained("good", LONG), *(request for request, _ in bad.values()))
    for name, (_, reason) in bad.items():
        assert results[name].error == reason
    assert re.fullmatch(LONG.text, results["good"].texts[0])


def test_a_matcher_that_fails_under_its_mask_ends_its_request(
    names: dict[int, str], compiler: LlguidanceCompiler
) -> None:
    """The library allows an end of sequence then, which would pass for the end of a text that matches."""
    matcher = compiler.compile(LONG).matcher()
    matcher.inner.consume_token(100)
    words = np.full((1, -(-VOCAB_SIZE // 32)), -1, dtype=np.int32)
    compiler.fill([matcher], words)
    assert TokenMasks([0], words).allows(0, EOS)
    assert matcher.failure == "GRAMMAR_STUCK"

    class Broken(SlowCompiler):
        def fill(self, matchers: Sequence[Matcher], masks: TokenMask) -> None:
            for each in matchers:
                assert isinstance(each, LlguidanceMatcher)
                each.inner.consume_token(100)
            super().fill(matchers, masks)

    broken = Broken(compiler)
    broken.may_go_on.set()
    results = generate(make_engine(names, broken)[0], constrained("r", LONG), make_request("free", max_tokens=3))
    assert results["r"].error == "GRAMMAR_STUCK"
    assert results["free"].error is None


def test_without_a_compiler_it_is_an_error(names: dict[int, str]) -> None:
    engine, _ = make_engine(names, None)
    assert generate(engine, constrained("r", LONG))["r"].error == "STRUCTURED_OUTPUT_UNSUPPORTED"


def test_grammars_are_compiled_once(compiler: LlguidanceCompiler) -> None:
    spec = StructuredOutput(GrammarKind.REGEX, "once")
    assert compiler.compile(spec) is compiler.compile(spec)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sampler_chooses_the_best_of_the_allowed(data: st.DataObject) -> None:
    """Greedy: as if the others were not there; sampled: as if their logits were minus infinity."""
    vocab_size, num_rows = 77, 5
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    rows, masked, words = [], [], []
    expected = logits.clone()
    for i in range(num_rows):
        fields: dict[str, Any] = {
            "temperature": data.draw(st.sampled_from([0.0, 0.7, 2.0])),
            "top_k": data.draw(st.sampled_from([0, 3])),
            "top_p": data.draw(st.sampled_from([1.0, 0.6])),
            "repetition_penalty": data.draw(st.sampled_from([1.0, 1.5])),
            "logprobs": True,
        }
        sequence = make_sequence(4, f"s{i}")
        rows.append(type(sequence)(f"s{i}", sequence.token_ids, SamplingParams(max_tokens=8, seed=i, **fields)))
        if data.draw(st.booleans()):
            allowed = data.draw(st.sets(st.integers(0, vocab_size - 1), min_size=1, max_size=20))
            bits = np.zeros(96, dtype=np.uint8)
            bits[list(allowed)] = 1
            masked.append(i)
            words.append(np.packbits(bits, bitorder="little").view(np.int32))
            forbidden = torch.ones(vocab_size, dtype=torch.bool)
            forbidden[list(allowed)] = False
            expected[i][forbidden] = float("-inf")
    masks = TokenMasks(masked, np.stack(words)) if masked else None
    for may_wait in (True, False):
        sampler = Sampler(CPU, may_wait=may_wait)
        found = sampler.sample(logits, rows, masks)
        assert found.token_ids == sampler.sample(expected, rows).token_ids
        raw = logits.log_softmax(-1)
        assert found.logprobs == pytest.approx({i: float(raw[i, t]) for i, t in enumerate(found.token_ids)}, abs=1e-5)


@given(st.recursive(st.floats(allow_nan=False) | st.text() | st.integers(), lambda inner: st.lists(inner, max_size=3)))
def test_number_length_is_that_of_the_number_at_the_end(value: Any) -> None:
    text = json.dumps(value)
    length = NumberLength()
    for position, character in enumerate(text.encode()):
        length.push(bytes([character]))
        before = text.encode()[: position + 1]
        if json.dumps(value).count('"') == 0:
            found = re.search(rb"[0-9.eE+-]*$", before)
            assert found is not None
            assert length.num_chars == len(found[0])
    assert length.num_chars == (len(re.search(r"[-+.0-9eE]*$", text)[0]) if not text.endswith('"') else 0)  # type: ignore[index]


def digits_taken(compiler: LlguidanceCompiler, tokenizer_json: bytes, spec: StructuredOutput, digits: str) -> int:
    """How many characters go in, one by one, while the mask allows them."""
    vocabulary = json.loads(tokenizer_json)["model"]["vocab"]
    matcher = compiler.compile(spec).matcher()
    for count, digit in enumerate(digits):
        words = np.full((1, -(-VOCAB_SIZE // 32)), -1, dtype=np.int32)
        compiler.fill([matcher], words)
        if not TokenMasks([0], words).allows(0, vocabulary[digit]):
            return count
        matcher.push(vocabulary[digit])
    return len(digits)


def test_a_number_without_bounds_ends(compiler: LlguidanceCompiler, tokenizer_json: bytes) -> None:
    def taken(schema: str, digits: str) -> int:
        return digits_taken(compiler, tokenizer_json, StructuredOutput(GrammarKind.JSON_SCHEMA, schema), digits)

    assert taken('{"type": "number"}', "0." + "3" * 60) == MAX_NUMBER_CHARS
    assert taken('{"type": "integer"}', "7" * 60) == MAX_NUMBER_CHARS
    assert taken('{"type": "number", "minimum": 0, "maximum": 1}', "0." + "3" * 60) == MAX_NUMBER_CHARS
    assert taken('{"const": 1000000000000000000000000000000}', "1" + "0" * 30) == 31, "a bound asks for them"
    assert taken('{"type": "string"}', '"' + "1" * 60 + '"') == 62
    assert digits_taken(compiler, tokenizer_json, StructuredOutput(GrammarKind.REGEX, "[0-9]+"), "7" * 60) == 60
    # Behind reasoning it is not known where the JSON begins.
    thoughtful = StructuredOutput(GrammarKind.JSON_SCHEMA, '{"type": "number"}', reasoning_format="think")
    assert digits_taken(compiler, tokenizer_json, thoughtful, "7" * 60) == 60


def test_no_step_looks_at_the_whole_vocabulary(tokenizer_json: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    class Noting(NumberTokens):
        def of(self, token_id: int) -> bytes:
            looked_at.append(token_id)
            return super().of(token_id)

        def __getattribute__(self, name: str) -> Any:
            if name == "_tokenizer":
                looked_at.append(-1)
            return super().__getattribute__(name)

    monkeypatch.setattr("worker.structured.NumberTokens", Noting)
    fresh = make_compiler(tokenizer_json, VOCAB_SIZE, (EOS,))
    assert fresh is not None
    assert len(looked_at) >= VOCAB_SIZE, "when it is made"
    looked_at.clear()
    number = StructuredOutput(GrammarKind.JSON_SCHEMA, '{"type": "number"}')
    assert digits_taken(fresh, tokenizer_json, number, "0." + "3" * 60) == MAX_NUMBER_CHARS
    assert len(looked_at) < 2 * MAX_NUMBER_CHARS, "one token at a time"


class SlowCompiler:
    """Compiles when it is told to."""

    def __init__(self, inner: LlguidanceCompiler) -> None:
        self.inner = inner
        self.may_go_on = threading.Event()

    def compile(self, spec: StructuredOutput) -> Grammar:
        assert self.may_go_on.wait(30)
        return self.inner.compile(spec)

    def fill(self, matchers: Sequence[Matcher], masks: TokenMask) -> None:
        self.inner.fill(matchers, masks)


async def test_others_go_on_while_a_grammar_compiles(names: dict[int, str], compiler: LlguidanceCompiler) -> None:
    slow = SlowCompiler(compiler)
    engine, _ = make_engine(names, slow)
    thread = EngineThread(engine)
    thread.start(asyncio.get_running_loop())
    thread.submit(constrained("slow", LONG))
    thread.submit(constrained("gone", LONG))
    thread.submit(make_request("quick", max_tokens=3))
    results: dict[str, Collected] = {}
    try:
        while "quick" not in results:
            result = await thread.next_result()
            thread.ack(result.step)
            results |= {output.request_id: output for output in result.outputs if output.finished}  # type: ignore[misc]
        assert set(results) == {"quick"}
        thread.abort("gone")
        slow.may_go_on.set()
        reasons: dict[str, FinishReason | None] = {}
        while len(reasons) < 2:
            result = await thread.next_result()
            thread.ack(result.step)
            for output in result.outputs:
                if output.finished:
                    reasons[output.request_id] = output.deltas[-1].finish_reason
        assert reasons == {"slow": FinishReason.STOP, "gone": FinishReason.CANCELLED}
    finally:
        thread.stop()
        await thread.join(10)


async def test_tenants_take_turns_at_having_their_grammars_compiled(
    names: dict[int, str], compiler: LlguidanceCompiler
) -> None:
    """And what fails to compile for a reason of its own ends its request alone."""
    compiled: list[str] = []

    class Noting(SlowCompiler):
        def compile(self, spec: StructuredOutput) -> Grammar:
            found = super().compile(spec)
            compiled.append(spec.text)
            if spec.text == "a2":
                raise RuntimeError("a fault in the library")
            return found

    slow = Noting(compiler)
    engine, _ = make_engine(names, slow)
    thread = EngineThread(engine)
    thread.start(asyncio.get_running_loop())
    try:
        for name in ("x0", "a1", "a2", "a3", "a4", "b1", "b2", "c1"):
            request = constrained(name, StructuredOutput(GrammarKind.REGEX, name))
            thread.submit(replace(request, tenant=name[0]))
        slow.may_go_on.set()
        errors: dict[str, str | None] = {}
        while len(errors) < 8:
            result = await thread.next_result()
            thread.ack(result.step)
            errors |= {output.request_id: output.error for output in result.outputs if output.finished}
        assert compiled == ["x0", "a1", "b1", "c1", "a2", "b2", "a3", "a4"]
        assert {name for name, error in errors.items() if error is not None} == {"a2"}
        assert errors["a2"] == "GRAMMAR_INVALID"
    finally:
        thread.stop()
        await thread.join(10)


def test_a_failure_while_compiling_is_the_requests_own(names: dict[int, str], compiler: LlguidanceCompiler) -> None:
    engine, _ = make_engine(names, compiler)
    prepared = engine.prepare(constrained("r", StructuredOutput(GrammarKind.REGEX, "(")))
    assert isinstance(prepared.grammar, GrammarFailure)
    driver = Driver(engine)
    driver.add(prepared)
    assert driver.run()["r"].error == "GRAMMAR_INVALID"

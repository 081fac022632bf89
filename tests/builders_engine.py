"""Builders for engine tests: tiny models of every family, a runner made of paper, a driver that collects outputs."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from zlib import crc32

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.generation import FinishReason, OutputDelta, SamplingParams, Usage
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.batch import TokensInFlight
from worker.engine.blocks import BlockPool
from worker.engine.loop import Engine, Runner
from worker.engine.runner import ModelRunner, StepOutOfMemory
from worker.engine.sampler import Sampler
from worker.engine.scheduler import BlockCopy, Plan
from worker.engine.sequence import Sequence
from worker.engine.settings import EngineSettings
from worker.engine.stopping import Detokenizer
from worker.engine.types import GenerationRequest, StepResult

_SMALL: Final[Mapping[str, Any]] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 200,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWED: Final[Mapping[str, Any]] = {"sliding_window": 8, "head_dim": 16}

FAMILIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": _WINDOWED,
    "gpt2": {},
    "gemma": {"head_dim": 16},
    "gemma2": {**_WINDOWED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**_WINDOWED, "query_pre_attn_scalar": 16},
    "phi": {},
    "phi3": {},
    "falcon": {},
    "gptj": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "rotary_dim": 8},
}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model of a family, small enough for a few milliseconds a step.

    Weights are large, so that greedy output wanders instead of repeating one token.
    """
    config = AutoConfig.for_model(family, **{**_SMALL, **FAMILIES.get(family, {}), **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def reference_tokens(model: PreTrainedModel, prompt: Iterable[int], sampling: SamplingParams) -> list[int]:
    """Greedy output of `model.generate` for one request alone."""
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sampling.max_tokens,
        do_sample=False,
        repetition_penalty=sampling.repetition_penalty,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size,
        eos_token_id=list(sampling.stop_token_ids) or None,
        pad_token_id=0,
    )
    return output[0, ids.shape[1] :].tolist()


class TokenNames:
    """A detokenizer whose text names the tokens: 7 is "7 "."""

    def push(self, token_id: int) -> str:
        return f"{token_id} "

    def flush(self) -> str:
        return ""


class PaperRunner:
    """A runner without a model: logits are a hash of all tokens so far, and a slot remembers what it stands for.

    With a `memory` logits depend on that many last tokens only, so that outputs become periodic and can be guessed.

    Before a step it checks that every token counted as computed has its own prefix in its slot, *written by an earlier
    step*. So it fails at once on a wrong block table, on a block shared too early and on one that was handed out twice.
    """

    def __init__(
        self,
        num_blocks: int = 33,
        block_size: int = 4,
        max_model_len: int = 64,
        vocab_size: int = 40,
        memory: int | None = None,
    ) -> None:
        self.device = torch.device("cpu")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_model_len = min(max_model_len, (num_blocks - 1) * block_size)
        self.max_source_tokens = 0
        self.vocab_size = vocab_size
        self.memory = memory
        self.num_steps = 0
        self.num_rows = 0  # computed in all steps
        self.num_draft_rows = 0  # of these, for drafts
        self.fail_steps: set[int] = set()  # run out of memory in these
        self.poisoned_token: int | None = None  # a sequence whose last token this is gets NaN
        self.num_copies = 0
        self.fail_copies = False
        self._slots: dict[int, int] = {}

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        copies = list(copies)
        if self.fail_copies:
            raise StepOutOfMemory("as told")
        self.num_copies += len(copies)
        assert len({copy.target for copy in copies}) == len(copies), "two copies into one block"
        content = {
            copy.target * self.block_size + offset: self._slots.get(copy.source * self.block_size + offset)
            for copy in copies
            for offset in range(self.block_size)
        }
        self._slots.update({slot: prefix for slot, prefix in content.items() if prefix is not None})

    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        self.num_steps += 1
        self.num_rows += sum(chunk.num_tokens for chunk in plan.chunks)
        self.num_draft_rows += sum(len(chunk.drafts) for chunk in plan.chunks)
        written: dict[int, int] = {}
        rows = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            tokens = sequence.token_ids + chunk.drafts
            if sequence.num_pending:
                assert in_flight is not None, "a token is computed that nobody knows"
                tokens[-1] = int(in_flight.token_ids[in_flight.rows[sequence]])
            prefixes = prefix_hashes(tokens)
            end = sequence.num_computed_tokens + chunk.num_tokens
            for position in range(end):
                slot = sequence.block_ids[position // self.block_size] * self.block_size + position % self.block_size
                assert slot >= self.block_size, "the scratch block was handed out"
                if position < sequence.num_computed_tokens:
                    assert self._slots.get(slot) == prefixes[position], f"{sequence} reads a slot that is not its own"
                else:
                    assert slot not in written, "two sequences write one slot"
                    written[slot] = prefixes[position]
            assert chunk.is_last == (end == len(tokens)), "drafts are no part of the prompt's chunks"
            rows += [self._logits(tokens[: index + 1]) for index in range(end - chunk.num_logit_rows, end)]
        if self.num_steps in self.fail_steps:
            raise StepOutOfMemory("as told")
        self._slots.update(written)
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, self.vocab_size)

    def _logits(self, tokens: array[int]) -> np.ndarray:
        if tokens[-1] == self.poisoned_token:
            return np.full(self.vocab_size, np.nan, dtype=np.float32)
        seen = tokens if self.memory is None else tokens[-self.memory :]
        return paper_logits(prefix_hashes(seen)[-1], self.vocab_size)


def prefix_hashes(token_ids: Iterable[int]) -> list[int]:
    """One number per token that stands for all tokens up to it."""
    value, hashes = 17, []
    for token_id in token_ids:
        value = (value * 1_000_003 + token_id + 1) % (1 << 61)
        hashes.append(value)
    return hashes


def paper_logits(prefix: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(prefix).normal(scale=2, size=vocab_size).astype(np.float32)


def paper_tokens(prompt: Iterable[int], num_tokens: int, vocab_size: int = 40) -> list[int]:
    """Greedy output of the paper model."""
    tokens = list(prompt)
    start = len(tokens)
    for _ in range(num_tokens):
        tokens.append(int(paper_logits(prefix_hashes(tokens)[-1], vocab_size).argmax()))
    return tokens[start:]


def make_settings(**overrides: Any) -> EngineSettings:
    """Small limits: 4 slots a block, 16 tokens and 4 sequences a step."""
    return EngineSettings(**{"token_budget": 16, "max_num_seqs": 4, "block_size": 4, **overrides})


def make_engine(
    runner: Runner | PreTrainedModel,
    new_detokenizer: Callable[[], Detokenizer] = TokenNames,
    runs_ahead: bool = False,
    **settings: Any,
) -> Engine:
    """An engine over a paper runner, or over a copy of a model with `torch_ref` attention.

    One that runs ahead samples as on a GPU, without looking at results on the way.
    """
    limits = make_settings(**settings)
    if isinstance(runner, PreTrainedModel):
        runner = ModelRunner(copy.deepcopy(runner), TorchAttention(limits.block_size), limits)
    engine = Engine(runner, limits, new_detokenizer, runs_ahead=runs_ahead)
    engine._sampler = Sampler(runner.device, may_wait=not runs_ahead)
    return engine


def make_request(request_id: str = "r", prompt: Iterable[int] = (1, 2, 3), **fields: Any) -> GenerationRequest:
    """Fields of SamplingParams and of GenerationRequest may be mixed."""
    own = {name: fields.pop(name) for name in list(fields) if name in GenerationRequest.__dataclass_fields__}
    sampling = SamplingParams(**{"max_tokens": 8, **fields})
    return GenerationRequest(request_id, tuple(prompt), sampling, **own)


def make_sequence(num_prompt_tokens: int = 8, request_id: str = "s", **fields: Any) -> Sequence:
    """A sequence whose prompt starts with a token of its own, so that nobody hits its blocks by accident."""
    prompt = fields.pop("prompt", None) or [crc32(request_id.encode()) % 1000, *range(1, num_prompt_tokens)]
    return Sequence(request_id, prompt, SamplingParams(max_tokens=8), **fields)


def make_pool(num_usable_blocks: int = 16, block_size: int = 4, **fields: Any) -> BlockPool:
    return BlockPool(num_usable_blocks + 1, block_size, **fields)


@dataclass
class Collected:
    """What came out for one request, checked for order on the way."""

    num_outputs: int = 1
    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    reasons: list[FinishReason | None] = field(default_factory=list)
    stop_matches: list[str | int | None] = field(default_factory=list)
    usage: Usage | None = None
    error: str | None = None

    @classmethod
    def of(cls, request: GenerationRequest) -> Collected:
        num_outputs = request.sampling.num_outputs
        emitted = request.emitted or ((),) * num_outputs
        return cls(
            num_outputs,
            [list(ids) for ids in emitted],
            [""] * num_outputs,
            [[] for _ in range(num_outputs)],
            [None] * num_outputs,
            [None] * num_outputs,
        )

    def take(self, delta: OutputDelta) -> None:
        index = delta.output_index
        assert self.reasons[index] is None, "a delta after the end"
        assert delta.first_token_index == len(self.tokens[index]), "a token is missing or repeated"
        self.tokens[index] += delta.token_ids
        self.texts[index] += delta.text
        self.logprobs[index] += delta.logprobs
        self.reasons[index] = delta.finish_reason
        self.stop_matches[index] = delta.stop_match


class Driver:
    """Steps an engine and collects what comes out, request by request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.now = 0.0
        self.results: dict[str, Collected] = {}

    def add(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.results[request.request_id] = Collected.of(request)
            self.engine.add(request)

    def step(self) -> StepResult:
        result = self.engine.step(self.now)
        self.engine.check_integrity()
        self._check_blocks()
        for output in result.outputs:
            collected = self.results[output.request_id]
            assert collected.usage is None, "output after the end"
            assert collected.error is None, "output after an error"
            for delta in output.deltas:
                collected.take(delta)
            collected.usage, collected.error = output.usage, output.error
        return result

    def _check_blocks(self) -> None:
        """Sequences hold no more blocks than they need, and what others may share is computed.

        Guesses of a step in flight need room too: one that follows on a part of a prompt is launched with them.
        """
        pool, flight = self.engine._pool, self.engine._flight
        num_drafts = {chunk.sequence: len(chunk.drafts) for chunk in flight.plan.chunks} if flight else {}
        for sequence in self.engine._scheduler.sequences():
            num_tokens = sequence.num_tokens + num_drafts.get(sequence, 0)
            assert len(sequence.block_ids) <= pool.num_blocks_for(num_tokens), sequence
            known = [i for i, block_id in enumerate(sequence.block_ids) if block_id in pool._hash_of_block]
            assert all((i + 1) * pool.block_size <= sequence.num_computed_tokens for i in known), sequence

    def run(self, max_steps: int = 5000) -> dict[str, Collected]:
        """Step until nothing is left to do; also checks that all blocks came back."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                stats = self.engine.stats()
                assert stats.num_free_blocks == stats.num_blocks
                return self.results
            self.step()
        raise AssertionError(f"not done after {max_steps} steps: {self.engine.stats()}")


def generate(engine: Engine, *requests: GenerationRequest) -> dict[str, Collected]:
    """Run requests together to their ends."""
    driver = Driver(engine)
    driver.add(*requests)
    return driver.run()

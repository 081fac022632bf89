"""What goes into the engine and comes out of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, TypeAlias

from common.generation import ChatParsing, OutputDelta, PromptScores, SamplingParams, ToolCallDelta, Usage
from common.tasks import Task, TaskResult
from worker.engine.adapters.types import AdapterFailure, AdapterLease
from worker.engine.grammar import Grammar, GrammarFailure

# A request's error: its own parameters left no token to choose.
ALL_TOKENS_FORBIDDEN: Final = "ALL_TOKENS_FORBIDDEN"

# The parts of a step, in order; "end" stands behind the last one.
Part: TypeAlias = Literal["plan", "batch", "forward", "sample", "update", "end"]
OnPart: TypeAlias = Callable[[Part], None]  # called on the engine's thread when a part begins


def ignore_part(part: Part) -> None:
    """Nobody watches."""


class DuplicateRequest(Exception):
    """A request of this id is in the engine already."""


class Parts(NamedTuple):
    """What an output's text, or a piece of it, turns out to be."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()

    def __add__(self, other: object) -> Parts:  # in the place of a tuple's own
        if not isinstance(other, Parts):
            return NotImplemented
        return Parts(self.text + other.text, self.reasoning + other.reasoning, self.calls + other.calls)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation to decode.

    A takeover differs from a fresh request only in `emitted`: the ids that each output already has in the log, in
    order. The engine prefills them behind the prompt, replays text and stop state, and goes on at the next index.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    emitted: tuple[tuple[int, ...], ...] = ()  # per output; () when nothing was emitted
    finished_outputs: frozenset[int] = frozenset()  # outputs whose end is in the log already
    cache_salt: bytes = b""
    priority: int = 0  # lower runs first and is preempted last
    deadline: float | None = None  # time.monotonic() seconds; the outputs then end with TIME_LIMIT
    tenant: str = ""  # among waiting requests of one priority, tenants take turns by service over weight
    weight: float = 1.0
    chat: ChatParsing | None = None  # None: text is text
    num_scored_tokens: int = 0  # of the prompt, in the log already; where its log-probabilities are asked for
    echo_text: str = ""  # stands before the text of every output
    # What sampling.adapter names, in memory; released when the request is over.
    adapter: AdapterLease | AdapterFailure | None = None
    grammar: Grammar | GrammarFailure | None = None  # of sampling.structured_output, where it was compiled beforehand
    source_token_ids: tuple[int, ...] = ()  # what the encoder reads, where the model has one
    task: Task | None = None  # in the place of prompt and sampling, for an engine of encoder models


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step produced for one request."""

    request_id: str
    deltas: tuple[OutputDelta, ...] = ()
    usage: Usage | None = None  # set when the request ended
    # A machine-readable reason (NAN_LOGITS, OUT_OF_MEMORY ...); the request is gone from the engine.
    error: str | None = None
    num_held_tokens: int = 0  # decoded in this step, and in no delta: those of beams
    prompt_scores: PromptScores | None = None  # they come in order, the last ones not behind the first token
    result: TaskResult | None = None  # of a request with a task, when it ended

    @property
    def finished(self) -> bool:
        return self.usage is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Everything that one step produced; empty `outputs` when the step only prefilled."""

    step: int  # counts steps from 1
    outputs: tuple[RequestOutput, ...] = ()
    duration_s: float = 0.0
    num_tokens: int = 0  # computed, those of prompts included
    num_sequences: int = 0  # that these belong to


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's state after its latest step; sent with the worker's heartbeat."""

    num_steps: int = 0
    num_running: int = 0  # sequences with blocks
    num_waiting: int = 0  # sequences without
    num_blocks: int = 0
    num_free_blocks: int = 0  # never used, freed, or only cached for prefix hits
    block_size: int = 16
    num_preemptions: int = 0
    prompt_tokens: int = 0  # computed or hit, since the start
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    last_step_ms: float = 0.0
    held_request_ids: tuple[str, ...] = field(default=())

    @property
    def free_kv_tokens(self) -> int:
        return self.num_free_blocks * self.block_size

"""What a generation is, between gateway, Redis and worker: its parameters, its events, its end.

These structs are what job bodies and log entries hold (msgpack, see `common/records.py`). They only grow: a new field
gets a default, so that an older worker's records still decode and a newer gateway's extra fields are ignored by an
older worker; but for those of SamplingParams, which it must not ignore: it leaves such a job to a newer one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import msgspec

from common.tasks import Task, TaskResult, num_tokens

Alternatives: TypeAlias = tuple[tuple[int, float], ...]  # token ids with log-probabilities, the most probable first


class FinishReason(StrEnum):
    """Why one output ended. Failures are not finish reasons: they are errors of the whole generation."""

    STOP = "stop"  # an end-of-sequence id, a stop id or a stop string
    LENGTH = "length"  # max_tokens, or the model's context
    TIME_LIMIT = "time_limit"
    CANCELLED = "cancelled"
    TOOL_CALLS = "tool_calls"  # the model calls tools and waits for what they answer


class EarlyStopping(StrEnum):
    """When a beam search with as many finished sequences as beams ends. Names and meaning are transformers'."""

    HEURISTIC = "false"  # once no beam is likely to get better than the worst of them
    WHEN_FULL = "true"  # at once
    NEVER = "never"  # once no beam can get better than the worst of them


class GrammarKind(StrEnum):
    """How a constraint on an output's text is written."""

    JSON_OBJECT = "json_object"  # any
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICES = "choices"
    LARK = "lark"
    TEXT = "text"  # any; of chats, where calls or reasoning are constrained alone


class ToolGrammar(msgspec.Struct, frozen=True, array_like=True):
    """The tool calls that an answer may have."""

    format: str  # of common/chat_formats.py
    tools: tuple[tuple[str, str], ...]  # names, and JSON schemas of their arguments
    must_call: bool = False
    parallel: bool = True  # several in one answer


class StructuredOutput(msgspec.Struct, frozen=True, array_like=True):
    """What an output's text must match."""

    kind: GrammarKind
    text: str = ""  # the schema, expression or grammar
    choices: tuple[str, ...] = ()
    tools: ToolGrammar | None = None  # or calls of these tools
    reasoning_format: str = ""  # behind reasoning that is marked so
    in_reasoning: bool = False  # which the prompt has begun


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """A revision of an adapter, as a worker publishes it."""

    name: str
    revision: str  # digest of its files


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen and when an output ends. Everything is resolved: no field means "the model's default".

    Ranges are checked at the gateway's edge; the engine relies on them. What is at its default is not stored, and an
    unknown field is no record of ours: a worker never decodes without a parameter that is in force.
    """

    max_tokens: int  # most tokens of each output; 0 only where the prompt is scored or echoed
    temperature: float = 0.0  # 0 is greedy: the next three are then ignored
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1): relative to the most probable token
    repetition_penalty: float = 1.0  # > 0; over prompt and output, as transformers does
    no_repeat_ngram_size: int = 0  # 0 is off; over prompt and output, as transformers does
    seed: int = 0  # unsigned 64 bits; drawn at enqueue when the caller gave none
    num_outputs: int = 1
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # the caller's and the model's end-of-sequence ids
    logprobs: bool = False  # report the log-probability of every sampled token
    top_logprobs: int = 0  # with that, so many alternatives of each, and its rank
    include_stop: bool = False  # a stop string that ends an output stays in its text
    num_best: int = 0  # report so many outputs of `num_outputs`, at the end: those of the highest score; 0: report all
    prompt_logprobs: int | None = None  # report the prompt's log-probabilities, with so many alternatives of each token
    # All below as transformers' logits processors of these names, where it has them; "ends" are the stop_token_ids.
    min_tokens: int = 0  # no end and no stop string before so many; at most max_tokens
    top_h: float = 0.0  # (0, 1]; 0 is off
    typical_p: float = 1.0  # (0, 1]; 1 is off
    epsilon_cutoff: float = 0.0  # [0, 1); 0 is off
    eta_cutoff: float = 0.0  # [0, 1); 0 is off
    presence_penalty: float = 0.0  # taken from the score of every token of the output
    frequency_penalty: float = 0.0  # likewise, as often as it occurs there
    encoder_repetition_penalty: float = 1.0  # > 0; over the prompt, above 1 for its tokens
    encoder_no_repeat_ngram_size: int = 0  # 0 is off; n-grams of the prompt
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # each not empty; one end alone is not forbidden
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()  # each sequence once, not empty; logit_bias included
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()  # as the first token
    exponential_decay_length_penalty: tuple[int, float] | None = None  # begins behind so many tokens; factor > 0
    forced_eos_token_id: int | None = None  # what the last token of max_tokens is
    structured_output: StructuredOutput | None = None
    num_beams: int = 1  # above 1: the best `num_outputs` sequences that a beam search of this width finds, at the end
    length_penalty: float = 1.0  # a sequence's score is the sum of its log-probabilities over length ** this
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    renormalize_logits: bool = False  # scores of beams are log-probabilities again after all edits
    adapter: AdapterRef | None = None  # what is added to the model's weights
    forced_bos_token_id: int | None = None  # what the first new token is

    @property
    def num_sequences(self) -> int:
        """Most sequences that are decoded at a time."""
        return max(self.num_outputs, self.num_beams)


def peak_kv_tokens(
    num_prompt_tokens: int, sampling: SamplingParams, block_tokens: int, num_source_tokens: int = 0
) -> int:
    """Return the KV slots without which a generation can never end.

    Outputs may be decoded one after another: the longest alone must fit. Beams are decoded together, and share no more
    than the prompt's full blocks in the worst case. What an encoder read is kept once, in whole blocks of its own.
    """
    num_shared = 0 if sampling.num_beams == 1 else num_prompt_tokens // block_tokens * block_tokens
    num_own = -(-(num_prompt_tokens - num_shared + sampling.max_tokens) // block_tokens) * block_tokens
    return -(-num_source_tokens // block_tokens) * block_tokens + num_shared + sampling.num_beams * num_own


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that a generation cost."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0  # of the prompt's tokens, those whose keys and values came from the prefix cache
    completion_tokens: int = 0  # over all outputs


class ToolCallDelta(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a tool call. The name comes whole in the first one; the pieces of the arguments are to be joined."""

    index: int  # of the call in its output
    name: str = ""
    arguments: str = ""  # JSON text of an object


class ChatParsing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an output's text is taken apart into, besides plain text; see `common/chat_formats.py` for the formats."""

    reasoning_format: str = ""  # empty: none is looked for
    in_reasoning: bool = False  # the prompt ends inside the model's reasoning
    tool_format: str = ""  # empty: none is looked for
    tool_names: tuple[str, ...] = ()  # the tools offered
    max_tool_calls: int = 0  # after so many the output ends; 0 is as many as the model makes


class OutputDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one output, or its end.

    `token_ids` may run ahead of `text`: text is held back inside a multi-byte character and while it may be the
    beginning of a stop string. At a stop match text is cut before the match; ids are not.
    """

    output_index: int  # 0 to num_outputs-1
    first_token_index: int  # index in that output of token_ids[0]
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[
        float, ...
    ] = ()  # one per token id when asked for, of the distribution before temperature and filters
    finish_reason: FinishReason | None = None  # set once, in the output's last delta
    stop_match: str | int | None = None  # the stop string or token id that ended it
    top_logprobs: tuple[Alternatives, ...] = ()  # one per token id when asked for, of the same distribution
    ranks: tuple[int, ...] = ()  # with these, of the token ids themselves: 1 is the most probable
    # With the end, where outputs were chosen by it: mean log-probability of its tokens, or a beam's score.
    score: float | None = None
    reasoning_text: str = ""  # of chats, where the model's format sets it apart
    tool_calls: tuple[ToolCallDelta, ...] = ()


class PromptScores(msgspec.Struct, frozen=True, array_like=True):
    """How probable tokens of the prompt were after those before them, in order; the first one has no probability."""

    first_token_index: int  # in the prompt, at least 1
    logprobs: tuple[float, ...] = ()
    ranks: tuple[int, ...] = ()
    top_logprobs: tuple[Alternatives, ...] = ()  # one per token, maybe empty


class EventBody(msgspec.Struct, frozen=True, array_like=True):
    """Payload of one log entry. Possibly without deltas; an entry that ends the generation carries usage."""

    deltas: tuple[OutputDelta, ...] = ()
    usage: Usage | None = None
    prompt_scores: PromptScores | None = None
    result: TaskResult | None = None  # of a job with a task: its whole answer


class JobBody(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to run a generation; stored once, in the job's hash."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: bytes = b""  # enters the first block hash of the prefix cache, so that tenants do not share blocks
    chat: ChatParsing | None = None  # None: text is text
    version: int = 1
    echo_text: str = ""  # stands before the text of every output
    task: Task | None = None  # in the place of a generation: there is no prompt then, and no token to choose
    # What the encoder reads, where the model has one beside its decoder; the prompt is what the decoder begins with.
    source_token_ids: tuple[int, ...] = ()
    trace: str = ""  # traceparent of the call that it was made by

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the caller's input: what the worker reads before the first new one."""
        if self.task is not None:
            return num_tokens(self.task)
        return len(self.source_token_ids or self.prompt_token_ids)

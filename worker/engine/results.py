"""What a step has produced: tokens and ends as deltas, scores of prompts, requests that are over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from common.deltas import merge_tool_calls
from common.generation import FinishReason, OutputDelta, PromptScores, Usage
from worker.engine.beams import Hypothesis
from worker.engine.plan import Chunk, Plan
from worker.engine.sampler import SampledTokens
from worker.engine.scores import score_prompt, wants_logprobs
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.stopping import Progress, StopState
from worker.engine.types import RequestOutput


@dataclass(slots=True)
class Results:
    """Of the step in progress, by request id."""

    scores: dict[str, PromptScores] = field(default_factory=dict)
    _deltas: dict[str, list[OutputDelta]] = field(default_factory=dict)
    _ended: dict[str, Usage | str] = field(default_factory=dict)
    _num_held: Counter[str] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        """Whether a request is over."""
        return bool(self._ended)

    def has_ended(self, request_id: str) -> bool:
        return request_id in self._ended

    def add(self, request_id: str, delta: OutputDelta) -> None:
        self._deltas.setdefault(request_id, []).append(delta)

    def hold(self, request_id: str, num_tokens: int) -> None:
        """So many tokens were decoded that are not reported yet, if ever."""
        self._num_held[request_id] += num_tokens

    def end(self, request_id: str, usage: Usage) -> None:
        """The request is over; this is what it used."""
        self._ended[request_id] = usage

    def fail(self, request_id: str, error: str) -> None:
        """The request is over by an error: what the step has produced of it does not count."""
        self._deltas.pop(request_id, None)
        self.scores.pop(request_id, None)
        self._ended[request_id] = error

    def take(self) -> tuple[RequestOutput, ...]:
        """Return all, and begin anew."""
        deltas, scores, ended = self._deltas, self.scores, self._ended
        num_held = self._num_held
        self._deltas, self.scores, self._ended, self._num_held = {}, {}, {}, Counter()
        outputs = []
        for request_id in dict.fromkeys((*scores, *deltas, *ended, *num_held)):
            end = ended.get(request_id)
            outputs.append(
                RequestOutput(
                    request_id,
                    tuple(deltas.get(request_id, ())),
                    usage=end if isinstance(end, Usage) else None,
                    error=end if isinstance(end, str) else None,
                    num_held_tokens=num_held[request_id],
                    prompt_scores=scores.get(request_id),
                )
            )
        return tuple(outputs)


def valid_rows(plan: Plan, sampled: SampledTokens) -> Iterator[tuple[Chunk, range]]:
    """The sampled rows of each chunk that has any, up to the first invalid one.

    An invalid row of a draft ends no request: the next step computes its place alone, and if it is invalid without
    drafts too, that does.
    """
    invalid = set(sampled.invalid_rows)
    row = 0
    for chunk in plan.chunks:
        if chunk.is_last:
            rows = range(row, row + chunk.num_sampled_rows)
            row = rows.stop
            yield chunk, rows[: next((i for i, r in enumerate(rows) if r in invalid), None)] if invalid else rows


def score_chunk(chunk: Chunk, rows: range, logits: torch.Tensor) -> tuple[EngineSequence, PromptScores]:
    """Score the prompt's tokens behind these rows of a chunk that was just computed."""
    sequence = chunk.sequence
    first = sequence.num_computed_tokens + chunk.num_tokens - chunk.num_logit_rows + 1
    token_ids = sequence.token_ids[first : first + len(rows)]
    return sequence, score_prompt(
        logits[rows.start : rows.stop], token_ids, first, sequence.sampling.prompt_logprobs or 0
    )


def token_delta(
    sequence: EngineSequence,
    first_token_index: int,
    rows: range,
    sampled: SampledTokens,
    steps: Sequence[Progress],
    echo_text: str,
) -> OutputDelta:
    """Return what is new of an output: the tokens of these rows, and what each of them did."""
    sampling = sequence.sampling
    details_of = [sampled.details[row] for row in rows] if sampling.top_logprobs else []
    return OutputDelta(
        output_index=sequence.output_index,
        first_token_index=first_token_index,
        token_ids=tuple(sampled.token_ids[row] for row in rows),
        text=echo_text + "".join(step.text for step in steps),
        logprobs=tuple(sampled.logprobs[row] for row in rows) if wants_logprobs(sampling) else (),
        finish_reason=steps[-1].finish_reason,
        stop_match=steps[-1].stop_match,
        top_logprobs=tuple(details.alternatives for details in details_of),
        ranks=tuple(details.rank for details in details_of),
        reasoning_text="".join(step.reasoning_text for step in steps),
        tool_calls=merge_tool_calls(call for step in steps for call in step.tool_calls),
    )


def beam_delta(
    output_index: int, found: Hypothesis | None, stop: StopState, reason: FinishReason | None, echo_text: str
) -> OutputDelta:
    """Return a whole output, with its score; an empty one if nothing was found.

    `reason` is why it ends where the search was cut, whether it is complete or not.
    """
    steps: list[Progress] = []
    for token_id in () if found is None else found.token_ids:
        if stop.finished is None:
            steps.append(stop.push(token_id))
    num_tokens = len(steps)
    if stop.finished is None:
        steps.append(stop.end(reason or FinishReason.LENGTH))
    return OutputDelta(
        output_index=output_index,
        first_token_index=0,
        token_ids=found.token_ids[:num_tokens] if found is not None else (),
        text=echo_text + "".join(step.text for step in steps),
        finish_reason=reason or steps[-1].finish_reason,
        stop_match=None if reason is not None else steps[-1].stop_match,
        score=None if found is None else found.score,
        reasoning_text="".join(step.reasoning_text for step in steps),
        tool_calls=merge_tool_calls(call for step in steps for call in step.tool_calls),
    )


def end_delta(output_index: int, num_output_tokens: int, end: Progress, echo_text: str = "") -> OutputDelta:
    """Return an output's end, without a token."""
    return OutputDelta(
        output_index=output_index,
        first_token_index=num_output_tokens,
        text=echo_text + end.text,
        finish_reason=end.finish_reason,
        stop_match=end.stop_match,
        reasoning_text=end.reasoning_text,
        tool_calls=merge_tool_calls(end.tool_calls),
    )

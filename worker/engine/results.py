"""What a step has produced: tokens and ends as deltas, scores of prompts, requests that are over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.deltas import merge_tool_calls
from common.generation import OutputDelta, PromptScores, Usage
from worker.engine.sampler import SampledTokens
from worker.engine.scores import wants_logprobs
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.stopping import Progress
from worker.engine.types import RequestOutput


@dataclass(slots=True)
class Results:
    """Of the step in progress, by request id."""

    scores: dict[str, PromptScores] = field(default_factory=dict)
    _deltas: dict[str, list[OutputDelta]] = field(default_factory=dict)
    _ended: dict[str, Usage | str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether a request is over."""
        return bool(self._ended)

    def has_ended(self, request_id: str) -> bool:
        return request_id in self._ended

    def add(self, request_id: str, delta: OutputDelta) -> None:
        self._deltas.setdefault(request_id, []).append(delta)

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
        self._deltas, self.scores, self._ended = {}, {}, {}
        outputs = []
        for request_id in dict.fromkeys((*scores, *deltas, *ended)):
            end = ended.get(request_id)
            outputs.append(
                RequestOutput(
                    request_id,
                    tuple(deltas.get(request_id, ())),
                    usage=end if isinstance(end, Usage) else None,
                    error=end if isinstance(end, str) else None,
                    prompt_scores=scores.get(request_id),
                )
            )
        return tuple(outputs)


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

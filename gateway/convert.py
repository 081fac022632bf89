"""From the queue's records to response messages."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Sequence
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from common import errors
from common.generation import Alternatives, FinishReason, OutputDelta, PromptScores, Usage
from common.jobs import GenerationRecord, JobState, Reason
from gateway import structured
from gateway.progress import LogPosition
from torchrelay.v1 import generation_pb2 as pb

_FINISH_REASONS: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.TIME_LIMIT: pb.FINISH_REASON_TIME_LIMIT,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}
_ID_LETTERS: Final = string.ascii_letters + string.digits
_ID_LENGTH: Final = 9  # what the strictest of chat templates takes


def duration(milliseconds: int) -> Duration:
    message = Duration()
    message.FromMilliseconds(milliseconds)
    return message


def timestamp(milliseconds: int) -> Timestamp:
    message = Timestamp()
    message.FromMilliseconds(milliseconds)
    return message


def set_wait(message: pb.Accepted | pb.Progress, expected_wait_ms: int | None) -> None:
    """Set or clear the expected wait of a generation in the queue."""
    message.ClearField("expected_wait")
    if expected_wait_ms is not None:
        message.expected_wait.FromMilliseconds(expected_wait_ms)


def tool_call_id(generation_id: str, output_index: int, index: int) -> str:
    """Return the id of a tool call: the same however often its events are read."""
    digest = hashlib.sha256(f"{generation_id}/{output_index}/{index}".encode()).digest()
    number = int.from_bytes(digest[:8])
    letters = []
    for _ in range(_ID_LENGTH):
        number, letter = divmod(number, len(_ID_LETTERS))
        letters.append(_ID_LETTERS[letter])
    return "".join(letters)


def delta_message(delta: OutputDelta, generation_id: str) -> pb.Delta:
    message = pb.Delta(
        output_index=delta.output_index,
        first_token_index=delta.first_token_index,
        token_ids=delta.token_ids,
        text=delta.text,
    )
    # Seldom there, and an empty list costs as much as a full one: this is made for every token.
    if delta.logprobs:
        message.logprobs.extend(delta.logprobs)
    if delta.reasoning_text:
        message.reasoning_text = delta.reasoning_text
    if delta.top_logprobs:
        message.top_logprobs.extend(map(_alternatives, delta.top_logprobs))
    if delta.ranks:
        message.ranks.extend(delta.ranks)
    for call in delta.tool_calls:
        call_id = tool_call_id(generation_id, delta.output_index, call.index) if call.name else ""
        message.tool_calls.add(index=call.index, id=call_id, name=call.name, arguments=call.arguments)
    return message


def _alternatives(found: Alternatives) -> pb.TokenAlternatives:
    return pb.TokenAlternatives(
        token_ids=[token_id for token_id, _ in found], logprobs=[logprob for _, logprob in found]
    )


def scores_message(scores: PromptScores) -> pb.PromptScores:
    return pb.PromptScores(
        first_token_index=scores.first_token_index,
        logprobs=scores.logprobs,
        ranks=scores.ranks,
        top_logprobs=map(_alternatives, scores.top_logprobs),
    )


def scores_event(scores: PromptScores, position: LogPosition) -> pb.GenerationEvent:
    """Return the event for scores of the prompt, which are known at this position or behind it."""
    return pb.GenerationEvent(
        sequence=position.sequence, chain_hash=chain_hash(position), prompt_scores=scores_message(scores)
    )


def deltas_event(deltas: Iterable[OutputDelta], position: LogPosition, generation_id: str) -> pb.GenerationEvent | None:
    """Return the event for new tokens; None if there is neither a token nor text, only an end."""
    messages = [delta_message(delta, generation_id) for delta in deltas if _has_news(delta)]
    if not messages:
        return None
    return pb.GenerationEvent(
        sequence=position.sequence, chain_hash=chain_hash(position), deltas=pb.Deltas(deltas=messages)
    )


def _has_news(delta: OutputDelta) -> bool:
    return bool(delta.token_ids or delta.text or delta.reasoning_text or delta.tool_calls)


def chain_hash(position: LogPosition) -> bytes:
    """Return the digest that goes with a position; empty before the first event."""
    return position.chain_hash or b"" if position.sequence else b""


def output_end(delta: OutputDelta) -> pb.OutputEnd:
    """Return how an output ended, from its last delta."""
    assert delta.finish_reason is not None
    end = pb.OutputEnd(output_index=delta.output_index, finish_reason=_FINISH_REASONS[delta.finish_reason])
    if isinstance(delta.stop_match, str):
        end.stop = delta.stop_match
    elif isinstance(delta.stop_match, int):
        end.stop_token_id = delta.stop_match
    if delta.score is not None:
        end.score = delta.score
    return end


def usage_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )


def timings_message(record: GenerationRecord) -> pb.Timings:
    """Return the times of a generation that ended."""
    timings = pb.Timings(
        total_time=duration(max(0, record.ended_ms - record.created_ms)),
        num_takeovers=max(0, record.num_claims - 1),
    )
    if record.started:
        timings.queue_time.FromMilliseconds(max(0, record.started_ms - record.created_ms))
    if record.first_token_ms:
        timings.time_to_first_token.FromMilliseconds(max(0, record.first_token_ms - record.created_ms))
    return timings


def finished_event(record: GenerationRecord, position: LogPosition, num_outputs: int) -> pb.GenerationEvent:
    """Return the last event of a generation that ended well."""
    otherwise = FinishReason.CANCELLED if record.state is JobState.CANCELLED else FinishReason.TIME_LIMIT
    finished = pb.Finished(
        outputs=[output_end(position.end_of(index, otherwise)) for index in range(num_outputs)],
        usage=usage_message(record.usage),
        timings=timings_message(record),
    )
    return pb.GenerationEvent(sequence=position.sequence, chain_hash=chain_hash(position), finished=finished)


def failure_of(record: GenerationRecord) -> errors.ServingError | None:
    """Return the error that a final state means to a caller; None for one that ended well."""
    if record.state is JobState.FAILED:
        if record.reason is Reason.LOG_LIMIT:
            return errors.LogLimitExceeded("the generation's events outgrew the limit on stored bytes")
        if record.reason is Reason.ALL_TOKENS_FORBIDDEN:
            return errors.InvalidRequest(
                "the config left no token that could be chosen next", reason=str(record.reason), field="config"
            )
        if record.reason is Reason.ADAPTER_NOT_FOUND:
            return errors.AdapterNotFound(
                "the adapter was removed or changed before the generation had ended", metadata={"field": "adapter"}
            )
        if record.reason is Reason.STRUCTURED_OUTPUT_UNSUPPORTED:
            return structured.unsupported()
        if record.reason.is_of_grammar:
            return structured.failed(record.reason, pb.Accepted.FromString(record.echo).config)
        return errors.WorkerFailed(
            "the generation failed on every worker that tried it", metadata={"detail": str(record.reason)}
        )
    if record.state is JobState.EXPIRED and not record.started:
        return errors.DeadlineExceeded("the time limit passed before a worker was free")
    return None


def state_of(record: GenerationRecord) -> pb.GenerationState.ValueType:
    """Return the state that callers see."""
    if record.state is JobState.QUEUED:
        return pb.GENERATION_STATE_RECOVERING if record.started else pb.GENERATION_STATE_QUEUED
    if record.state is JobState.EXPIRED:
        return pb.GENERATION_STATE_FINISHED if record.started else pb.GENERATION_STATE_EXPIRED
    return {
        JobState.RUNNING: pb.GENERATION_STATE_RUNNING,
        JobState.DONE: pb.GENERATION_STATE_FINISHED,
        JobState.FAILED: pb.GENERATION_STATE_FAILED,
        JobState.CANCELLED: pb.GENERATION_STATE_CANCELLED,
    }[record.state]


def progress_event(record: GenerationRecord, position: LogPosition) -> pb.GenerationEvent:
    """Return the state of a generation between tokens."""
    progress = pb.Progress(state=state_of(record))
    if record.state is JobState.QUEUED:
        progress.place = max(0, record.place - 1)
        set_wait(progress, record.expected_wait_ms)
    return pb.GenerationEvent(sequence=position.sequence, chain_hash=chain_hash(position), progress=progress)


def generation_message(
    record: GenerationRecord,
    accepted: pb.Accepted,
    deltas: Sequence[OutputDelta],
    position: LogPosition,
    scores: PromptScores | None = None,
) -> pb.Generation:
    """Return a generation with everything that its log holds."""
    failure = failure_of(record)
    message = pb.Generation(
        generation_id=record.generation_id,
        model=accepted.model,
        model_revision=accepted.model_revision,
        state=state_of(record),
        config=accepted.config,
        usage=usage_message(record.usage),
        create_time=timestamp(record.created_ms),
        last_sequence=position.sequence,
        chain_hash=chain_hash(position),
        error_reason=failure.reason if failure else "",
    )
    if record.state.is_final:
        message.timings.CopyFrom(timings_message(record))
    if scores is not None:
        message.prompt_scores.CopyFrom(scores_message(scores))
    by_index = {delta.output_index: delta for delta in deltas}
    otherwise = FinishReason.CANCELLED if record.state is JobState.CANCELLED else FinishReason.TIME_LIMIT
    for index in range(accepted.config.num_outputs or 1):
        output = message.outputs.add(output_index=index)
        known = by_index.get(index)
        if known is not None:
            output.text = known.text
            output.token_ids.extend(known.token_ids)
            output.logprobs.extend(known.logprobs)
            output.reasoning_text = known.reasoning_text
            for call in known.tool_calls:
                call_id = tool_call_id(record.generation_id, index, call.index)
                output.tool_calls.add(id=call_id, name=call.name, arguments=call.arguments)
            output.top_logprobs.extend(map(_alternatives, known.top_logprobs))
            output.ranks.extend(known.ranks)
        if index in position.ends or (record.state.is_final and failure is None):
            output.end.CopyFrom(output_end(position.end_of(index, otherwise)))
    return message

"""Joining deltas that travel together."""

from __future__ import annotations

from collections.abc import Iterable

from common.generation import OutputDelta, PromptScores, ToolCallDelta


def merge_deltas(deltas: Iterable[OutputDelta]) -> list[OutputDelta]:
    """Join deltas of the same output, in the order of each output's first.

    Deltas of one output must follow one another without a gap, as they do in a log.
    """
    parts: dict[int, list[OutputDelta]] = {}
    for delta in deltas:
        parts.setdefault(delta.output_index, []).append(delta)
    return [_joined(found) if len(found) > 1 else found[0] for found in parts.values()]


def _joined(parts: list[OutputDelta]) -> OutputDelta:
    first, last = parts[0], parts[-1]
    return OutputDelta(
        output_index=first.output_index,
        first_token_index=first.first_token_index,
        token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
        text="".join(part.text for part in parts),
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
        finish_reason=last.finish_reason,
        stop_match=last.stop_match,
        top_logprobs=tuple(found for part in parts for found in part.top_logprobs),
        ranks=tuple(rank for part in parts for rank in part.ranks),
        score=last.score,
        reasoning_text="".join(part.reasoning_text for part in parts),
        tool_calls=merge_tool_calls(call for part in parts for call in part.tool_calls),
    )


def merge_scores(parts: Iterable[PromptScores | None]) -> PromptScores | None:
    """Join scores of one prompt, each of which goes on where the one before ended; None without any."""
    found = [part for part in parts if part is not None]
    if len(found) < 2:
        return found[0] if found else None
    return PromptScores(
        first_token_index=found[0].first_token_index,
        logprobs=tuple(logprob for part in found for logprob in part.logprobs),
        ranks=tuple(rank for part in found for rank in part.ranks),
        top_logprobs=tuple(alternatives for part in found for alternatives in part.top_logprobs),
    )


def merge_tool_calls(pieces: Iterable[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """Join the pieces of each call, in the order of their first."""
    calls: dict[int, ToolCallDelta] = {}
    for piece in pieces:
        before = calls.get(piece.index)
        calls[piece.index] = (
            piece
            if before is None
            else ToolCallDelta(piece.index, before.name or piece.name, before.arguments + piece.arguments)
        )
    return tuple(calls.values())

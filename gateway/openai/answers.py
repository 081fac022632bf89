"""From events of generations to OpenAI's objects, whole or in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from common.errors import Aborted
from torchrelay.v1 import generation_pb2 as pb

_FINISH_REASONS: Final = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TIME_LIMIT: "length",  # the nearest that clients know
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
_LOWEST: Final = -9999.0  # as OpenAI writes the logarithm of nothing, which JSON has no number for
# Bytes of a token of the model's vocabulary.
BytesOfToken = Callable[[int], bytes]


class Scored(Protocol):
    """What deltas and whole outputs have in common."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
    @property
    def top_logprobs(self) -> Sequence[pb.TokenAlternatives]: ...


def finish_reason(end: pb.OutputEnd) -> str:
    """Raises Aborted for one that was cancelled meanwhile, by another call."""
    reason = _FINISH_REASONS.get(end.finish_reason)
    if reason is None:
        raise Aborted("the generation was cancelled", reason="CANCELLED")
    return reason


def usage_of(usages: Iterable[pb.Usage]) -> dict[str, Any]:
    """Return the sum of what generations cost."""
    found = list(usages)
    prompt, completion = sum(u.prompt_tokens for u in found), sum(u.completion_tokens for u in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_prompt_tokens for u in found)},
    }


def chat_logprobs(scored: Scored, token_bytes: BytesOfToken) -> dict[str, Any]:
    """Return the log-probabilities of a chat's tokens."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, _LOWEST), "bytes": list(data)}

    content = []
    for index, (token_id, logprob) in enumerate(zip(scored.token_ids, scored.logprobs, strict=True)):
        best = scored.top_logprobs[index] if index < len(scored.top_logprobs) else pb.TokenAlternatives()
        top = [entry(other, value) for other, value in zip(best.token_ids, best.logprobs, strict=True)]
        content.append(entry(token_id, logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    top_logprobs: Sequence[pb.TokenAlternatives],
    token_bytes: BytesOfToken,
    offset: int,
) -> tuple[dict[str, Any], int]:
    """Return the log-probabilities of a completion's tokens, and where the text of the next one begins.

    There may be one token more than log-probabilities: a prompt's first, which has none.
    """
    tokens, offsets, tops, shown_logprobs = [], [], [], list[float | None]()
    num_unscored = len(token_ids) - len(logprobs)
    for index, token_id in enumerate(token_ids):
        text = _shown(token_bytes(token_id))
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        at = index - num_unscored
        shown_logprobs.append(max(logprobs[at], _LOWEST) if at >= 0 else None)
        best = top_logprobs[at] if 0 <= at < len(top_logprobs) else None
        tops.append(
            None
            if best is None
            else {
                _shown(token_bytes(i)): max(value, _LOWEST)
                for i, value in zip(best.token_ids, best.logprobs, strict=True)
            }
        )
    shown = {"tokens": tokens, "token_logprobs": shown_logprobs, "top_logprobs": tops, "text_offset": offsets}
    return shown, offset


def _shown(data: bytes) -> str:
    """Return a token's text; a part of a character as OpenAI writes it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(slots=True)
class Envelope:
    """What stands around the choices of one answer."""

    id: str
    created: int  # seconds since the epoch
    model: str
    revision: str
    include_usage: bool = False

    def whole(self, kind: str, choices: list[dict[str, Any]], usages: Iterable[pb.Usage]) -> dict[str, Any]:
        """Return the object of an answer that is complete."""
        return {**self._head(kind), "choices": choices, "usage": usage_of(usages)}

    def chunk(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk of a stream."""
        return {**self._head(kind), "choices": choices, **({"usage": None} if self.include_usage else {})}

    def last_chunk(self, kind: str, usages: Iterable[pb.Usage]) -> dict[str, Any]:
        """Return the chunk that says what a stream cost."""
        return {**self._head(kind), "choices": [], "usage": usage_of(usages)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{self.revision[:12]}",
        }


class Choices(Protocol):
    """Makes the choices of one kind of answer."""

    whole_kind: str
    chunk_kind: str

    def of_output(self, index: int, output: pb.GenerationOutput, prompt_scores: pb.PromptScores) -> dict[str, Any]:
        """Return a whole choice."""
        ...

    def first(self, index: int) -> list[dict[str, Any]]:
        """Return what a stream begins with for this choice."""
        ...

    def of_delta(self, index: int, delta: pb.Delta) -> dict[str, Any]:
        """Return what is new of a choice."""
        ...

    def of_prompt(self, index: int, scores: pb.PromptScores) -> list[dict[str, Any]]:
        """Return what a stream tells of the prompt."""
        ...

    def of_end(self, index: int, end: pb.OutputEnd) -> dict[str, Any]:
        """Return the end of a choice."""
        ...


@dataclass(slots=True)
class ChatChoices:
    """Choices of chat completions."""

    token_bytes: BytesOfToken
    logprobs: bool
    whole_kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def of_output(self, index: int, output: pb.GenerationOutput, prompt_scores: pb.PromptScores) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        if output.reasoning_text:
            message["reasoning_content"] = output.reasoning_text
        if output.tool_calls:
            message["content"] = output.text or None
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in output.tool_calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(output, self.token_bytes) if self.logprobs else None,
            "finish_reason": finish_reason(output.end),
        }

    def first(self, index: int) -> list[dict[str, Any]]:
        return [self._choice(index, {"role": "assistant", "content": "", "refusal": None})]

    def of_delta(self, index: int, delta: pb.Delta) -> dict[str, Any]:
        news: dict[str, Any] = {}
        if delta.text:
            news["content"] = delta.text
        if delta.reasoning_text:
            news["reasoning_content"] = delta.reasoning_text
        if delta.tool_calls:
            news["tool_calls"] = [_call_piece(piece) for piece in delta.tool_calls]
        return self._choice(index, news, chat_logprobs(delta, self.token_bytes) if self.logprobs else None)

    def of_prompt(self, index: int, scores: pb.PromptScores) -> list[dict[str, Any]]:
        return []

    def of_end(self, index: int, end: pb.OutputEnd) -> dict[str, Any]:
        return self._choice(index, {}) | {"finish_reason": finish_reason(end)}

    @staticmethod
    def _choice(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _call_piece(piece: pb.ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": piece.arguments}
    if not piece.name:
        return {"index": piece.index, "function": function}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": {"name": piece.name, **function}}


@dataclass(slots=True)
class CompletionChoices:
    """Choices of completions. `prompts` are the prompts' token ids, where their scores are shown too: with echo."""

    token_bytes: BytesOfToken
    logprobs: bool
    num_outputs: int  # of each prompt
    prompts: Sequence[Sequence[int]] = ()
    offsets: dict[int, int] = field(default_factory=dict)  # of a stream, by choice: where the next token's text begins
    whole_kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def of_output(self, index: int, output: pb.GenerationOutput, prompt_scores: pb.PromptScores) -> dict[str, Any]:
        choice = self._choice(index, output.text)
        if self.logprobs:
            prompt = (*self.first(index), *self.of_prompt(index, prompt_scores))
            for one in (*prompt, self._scored(index, output)):
                if choice["logprobs"] is None:
                    choice["logprobs"] = one["logprobs"]
                else:
                    for name, values in one["logprobs"].items():
                        choice["logprobs"][name] += values
        return choice | {"finish_reason": finish_reason(output.end)}

    def first(self, index: int) -> list[dict[str, Any]]:
        # A prompt's first token has no probability, and comes with the second; where it is alone, nothing else comes.
        if not self.logprobs or not self.prompts or len(self.prompts[index // self.num_outputs]) != 1:
            return []
        return [self._choice(index, "") | self._logprobs(index, self.prompts[index // self.num_outputs], (), ())]

    def of_delta(self, index: int, delta: pb.Delta) -> dict[str, Any]:
        return self._choice(index, delta.text) | (self._scored(index, delta) if self.logprobs else {})

    def of_prompt(self, index: int, scores: pb.PromptScores) -> list[dict[str, Any]]:
        if not self.logprobs or not self.prompts or not scores.first_token_index:
            return []
        first = 0 if scores.first_token_index == 1 else scores.first_token_index
        ids = self.prompts[index // self.num_outputs][first : scores.first_token_index + len(scores.logprobs)]
        return [self._choice(index, "") | self._logprobs(index, ids, scores.logprobs, scores.top_logprobs)]

    def of_end(self, index: int, end: pb.OutputEnd) -> dict[str, Any]:
        return self._choice(index, "") | {"finish_reason": finish_reason(end)}

    def _scored(self, index: int, scored: Scored) -> dict[str, Any]:
        return self._logprobs(index, scored.token_ids, scored.logprobs, scored.top_logprobs)

    def _logprobs(
        self,
        index: int,
        ids: Sequence[int],
        logprobs: Sequence[float],
        top_logprobs: Sequence[pb.TokenAlternatives],
    ) -> dict[str, Any]:
        shown, self.offsets[index] = completion_logprobs(
            ids, logprobs, top_logprobs, self.token_bytes, self.offsets.get(index, 0)
        )
        return {"logprobs": shown}

    @staticmethod
    def _choice(index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

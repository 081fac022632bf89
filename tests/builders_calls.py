"""What calls return: events collected and held to the law of streams, and refusals taken apart."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from tests.builders_system import System, until
from torchrelay.admin.v1beta1 import fleet_pb2
from torchrelay.client import AsyncClient, RelayError
from torchrelay.client.errors import from_rpc_error
from torchrelay.v1 import generation_pb2 as pb


@dataclass
class Output:
    """One output, as far as its deltas came."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    reasoning: str = ""
    tool_calls: list[pb.ToolCall] = field(default_factory=list)
    end: pb.OutputEnd | None = None

    @property
    def finish_reason(self) -> int:
        return pb.FINISH_REASON_UNSPECIFIED if self.end is None else self.end.finish_reason


class Outcome:
    """Reads a stream of events and holds it to the law: Accepted first, every token once, in order, one end."""

    def __init__(self, events: AsyncIterable[pb.GenerationEvent]) -> None:
        self._events = events
        self.accepted: pb.Accepted | None = None
        self._is_resumed = False
        self.outputs: list[Output] = []
        self.finished: pb.Finished | None = None
        self.states: list[int] = []
        self.prompt_scores: list[pb.PromptScores] = []
        self.sequence = 0
        self.chain_hash = b""

    @classmethod
    def resumed(cls, events: AsyncIterable[pb.GenerationEvent], earlier: Outcome | None = None) -> Outcome:
        """Read what the client library resumes, from the beginning (one output) or behind what came earlier.

        The library hides the repeated Accepted.
        """
        outcome = cls(events)
        outcome._is_resumed = True
        outcome.outputs = [Output()] if earlier is None else copy.deepcopy(earlier.outputs)
        outcome.sequence = 0 if earlier is None else earlier.sequence
        return outcome

    @property
    def output(self) -> Output:
        """The only output."""
        (output,) = self.outputs
        return output

    @property
    def token_ids(self) -> list[int]:
        return self.output.token_ids if self.outputs else []

    @property
    def generation_id(self) -> str:
        return self.accepted.generation_id if self.accepted is not None else ""

    async def read(self, until: Callable[[Outcome], bool] | None = None) -> Outcome:
        """Read to the end, or until a condition holds; the call is then cancelled, as a caller does that goes away."""
        iterator = aiter(self._events)
        try:
            async for event in iterator:
                self._take(event)
                if until is not None and until(self):
                    return self
        finally:
            if isinstance(iterator, AsyncGenerator):
                await iterator.aclose()
        return self

    def _take(self, event: pb.GenerationEvent) -> None:
        assert self.finished is None, "an event after the end"
        assert event.sequence >= self.sequence, "the log goes backwards"
        self.sequence, self.chain_hash = event.sequence, event.chain_hash
        kind = event.WhichOneof("event")
        assert (kind == "accepted") == (self.accepted is None and not self._is_resumed), (
            "Accepted comes first, and once"
        )
        if kind == "accepted":
            self.accepted = event.accepted
            self.outputs = [Output() for _ in range(event.accepted.config.num_outputs or 1)]
        elif kind == "progress":
            self.states.append(event.progress.state)
        elif kind == "prompt_scores":
            self.prompt_scores.append(event.prompt_scores)
        elif kind == "finished":
            self.finished = event.finished
            assert [end.output_index for end in event.finished.outputs] == list(range(len(self.outputs)))
            for output, end in zip(self.outputs, event.finished.outputs, strict=True):
                output.end = end
        for delta in event.deltas.deltas:
            output = self.outputs[delta.output_index]
            assert delta.first_token_index == len(output.token_ids), "a gap or a repetition"
            output.token_ids += delta.token_ids
            output.text += delta.text
            output.logprobs += delta.logprobs
            output.alternatives += [alternatives_of(found) for found in delta.top_logprobs]
            output.ranks += delta.ranks
            output.reasoning += delta.reasoning_text
            for piece in delta.tool_calls:
                if piece.name:
                    assert piece.index == len(output.tool_calls), "calls come one after the other"
                    output.tool_calls.append(pb.ToolCall(id=piece.id, name=piece.name))
                output.tool_calls[piece.index].arguments += piece.arguments


def alternatives_of(found: pb.TokenAlternatives) -> list[tuple[int, float]]:
    return list(zip(found.token_ids, found.logprobs, strict=True))


async def events_of(call: Any) -> AsyncIterator[pb.GenerationEvent]:
    """Events of a bare stub's stream, which is cancelled when nobody reads on."""
    try:
        async for response in call:
            yield response.event
    finally:
        call.cancel()


async def ended(client: AsyncClient, generation_id: str) -> pb.Generation:
    """Wait for a generation's end and return it."""
    found = pb.Generation()

    async def has_ended() -> bool:
        found.CopyFrom(await client.get(generation_id))
        return found.state not in (
            pb.GENERATION_STATE_QUEUED,
            pb.GENERATION_STATE_RUNNING,
            pb.GENERATION_STATE_RECOVERING,
        )

    await until(has_ended, what="the generation's end")
    return found


async def idle_fleet(system: System, num_tokens: int = 0, timeout_s: float = 30) -> list[fleet_pb2.Worker]:
    """Wait until the workers have generated so many tokens together and every KV block is free; return them.

    Workers tell of themselves once in a while: of a generation that has just begun they may not have told yet.
    """
    fleet: list[fleet_pb2.Worker] = []

    async def is_idle() -> bool:
        fleet[:] = await system.fleet()
        return (
            bool(fleet)
            and sum(worker.generated_tokens for worker in fleet) >= num_tokens
            and all(worker.num_free_blocks == worker.num_blocks > 0 for worker in fleet)
            and all(worker.num_running == worker.num_waiting == 0 for worker in fleet)
        )

    await until(is_idle, timeout_s, f"all blocks free after {num_tokens} tokens")
    return fleet


@dataclass
class Refusal:
    """The status of a call that failed, as the client library reads it."""

    error: RelayError | None = None

    @property
    def code(self) -> grpc.StatusCode | None:
        return None if self.error is None else self.error.code

    @property
    def reason(self) -> str:
        return "" if self.error is None else self.error.reason

    @property
    def summary(self) -> tuple[grpc.StatusCode | None, str, str]:
        """Code, reason and text."""
        return self.code, self.reason, "" if self.error is None else self.error.message

    @property
    def fields(self) -> list[str]:
        return [] if self.error is None else [violation.field for violation in self.error.violations]


@contextlib.contextmanager
def refused() -> Iterator[Refusal]:
    """Expect the calls inside to fail; what they failed with is in the result."""
    refusal = Refusal()
    try:
        yield refusal
    except RelayError as error:
        refusal.error = error
    except grpc.aio.AioRpcError as error:
        refusal.error = from_rpc_error(error)
    assert refusal.error is not None, "the call was not refused"

"""The generations that a worker holds: from claimed job to engine request, from step results to events. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from common.deltas import merge_deltas, merge_scores
from common.generation import EventBody, OutputDelta, PromptScores
from common.jobs import ClaimedJob, JobState, NewEvent, Reason
from worker.engine.adapters.types import ADAPTER_NOT_FOUND
from worker.engine.types import ALL_TOKENS_FORBIDDEN, GenerationRequest, RequestOutput, StepResult
from worker.preemption import HIGHEST_CLASS, Runner
from worker.ranking import Ranking

_MAX_GATHER_S: Final = 0.16
_MAX_LATE_S: Final = 0.04  # so long what is due waits for the next step, whose commit can take it along
_MIN_GATHER_S: Final = 0.01  # less is not worth it: that is one more token, if any

# Errors that are no fault of the worker's.
_OF_THE_REQUEST: Final = frozenset({ALL_TOKENS_FORBIDDEN, ADAPTER_NOT_FOUND})


def _reason_of(error: str | None) -> Reason:
    if error is None:
        return Reason.NONE
    reason = Reason(error)
    return reason if error in _OF_THE_REQUEST or reason.is_of_grammar else Reason.WORKER_FAILED


@dataclass(slots=True)
class _Held:
    request_id: str  # in the engine; another one at each epoch, so that nothing of an earlier epoch is taken for ours
    kv_tokens: int  # slots that it still needs before its first token
    completion_tokens: int
    cached_prompt_tokens: int
    prompt_kv_tokens: int  # slots of its prompt
    priority: int
    age: int  # counts claims
    num_preemptions: int
    by_share: bool
    has_beams: bool
    furthest: int  # completion tokens that any attempt has come to, be it inside a search that begins anew
    ranking: Ranking | None = None  # where only the best outputs are reported


@dataclass(slots=True)
class _Growing:
    """One event in the making: what several steps produced for one generation."""

    deltas: list[OutputDelta] = field(default_factory=list)
    scores: list[PromptScores | None] = field(default_factory=list)
    num_held_tokens: int = 0
    last: RequestOutput | None = None
    is_urgent: bool = False

    def take(self, output: RequestOutput) -> None:
        self.deltas += output.deltas
        self.scores.append(output.prompt_scores)
        self.num_held_tokens += output.num_held_tokens
        self.last = output
        self.is_urgent = self.is_urgent or output.finished or any(map(_is_edge, output.deltas))


def _is_edge(delta: OutputDelta) -> bool:
    return delta.first_token_index == 0 or delta.finish_reason is not None


class Holdings:
    """What is held, and how much of the KV cache the part of it that has not begun will take."""

    def __init__(self, block_size: int, max_events_per_s: float = math.inf) -> None:
        """Tokens gather once there would be more events than that: an event costs as much as several tokens in it."""
        self._block_size = block_size
        self._max_events_per_s = max_events_per_s
        self._growing: dict[str, _Growing] = {}  # by generation, in the order of their first step
        self._released_at = -math.inf
        self._held: dict[str, _Held] = {}
        self._generation_ids: dict[str, str] = {}  # by request id
        self._num_claims = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, generation_id: str) -> bool:
        return generation_id in self._held

    def ids(self) -> list[str]:
        """Return the ids of all held generations, oldest first."""
        return list(self._held)

    @property
    def reserved_kv_tokens(self) -> int:
        """Slots that held generations still need before their first token; the engine's free blocks include them."""
        return sum(held.kv_tokens for held in self._held.values())

    def runners(self) -> list[Runner]:
        """Return all held generations as candidates for preemption. What one would free is its slots so far."""
        return [
            Runner(
                generation_id=generation_id,
                priority=held.priority,
                age=held.age,
                kv_tokens=held.prompt_kv_tokens + self._round_up(held.completion_tokens),
                num_preemptions=held.num_preemptions,
                by_share=held.by_share,
            )
            for generation_id, held in self._held.items()
        ]

    def _round_up(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size) * self._block_size

    def add(self, job: ClaimedJob, now: float) -> GenerationRequest:
        """Hold a job and return what the engine is to do. `now` is time.monotonic()."""
        sampling = job.body.sampling
        emitted: list[list[int]] = [[] for _ in range(sampling.num_outputs)]
        finished: set[int] = set()
        num_scored_tokens = 0
        for event in job.events:
            for delta in event.body.deltas if isinstance(event.body, EventBody) else ():
                emitted[delta.output_index] += delta.token_ids
                if delta.finish_reason is not None:
                    finished.add(delta.output_index)
            if isinstance(event.body, EventBody) and event.body.prompt_scores is not None:
                scores = event.body.prompt_scores
                num_scored_tokens = scores.first_token_index + len(scores.logprobs)
        completion_tokens = sum(map(len, emitted))
        prompt_kv_tokens = self._round_up(job.body.num_prompt_tokens)
        if job.body.source_token_ids:  # what its encoder reads has blocks of its own
            prompt_kv_tokens += self._round_up(len(job.body.prompt_token_ids))
        emitted_blocks = sum(1 + len(ids) // self._block_size for ids in emitted) if job.body.task is None else 0
        emitted_blocks += sampling.num_sequences - sampling.num_outputs
        self._num_claims += 1
        request_id = f"{job.generation_id}@{job.epoch}"
        self._generation_ids[request_id] = job.generation_id
        self._held[job.generation_id] = _Held(
            request_id=request_id,
            kv_tokens=prompt_kv_tokens + emitted_blocks * self._block_size,
            completion_tokens=completion_tokens,
            cached_prompt_tokens=job.usage.cached_prompt_tokens,
            prompt_kv_tokens=prompt_kv_tokens,
            priority=job.priority,
            age=self._num_claims,
            num_preemptions=job.num_preemptions,
            by_share=job.by_share,
            has_beams=sampling.num_beams > 1,
            furthest=job.usage.completion_tokens,
            ranking=Ranking(sampling) if sampling.num_best else None,
        )
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=job.body.prompt_token_ids,
            sampling=sampling,
            emitted=tuple(map(tuple, emitted)) if completion_tokens or finished else (),
            finished_outputs=frozenset(finished),
            cache_salt=job.body.cache_salt,
            # Where its class's share is due, those of a higher class must not starve it here either.
            priority=HIGHEST_CLASS if job.by_share else job.priority,
            tenant=job.tenant,
            weight=job.weight,
            chat=job.body.chat,
            deadline=now + job.remaining_ms / 1000,
            num_scored_tokens=num_scored_tokens,
            echo_text=job.body.echo_text,
            task=job.body.task,
            source_token_ids=job.body.source_token_ids,
        )

    def drop(self, generation_id: str) -> str | None:
        """Hold a generation no longer; return its request in the engine, None if it was not held."""
        held = self._held.pop(generation_id, None)
        if held is None:
            return None
        del self._generation_ids[held.request_id]
        self._growing.pop(generation_id, None)
        return held.request_id

    def events(self, results: Iterable[StepResult], now: float = 0.0) -> list[NewEvent]:
        """Turn steps into at most one event per generation, and hold those that ended no longer.

        Events of many streams come together, as often as they may (see `due_in`); those that somebody waits for come
        at once: the first of a claim or an output, and the last. What a step says of a generation that is not held,
        since it was lost meanwhile, is left out. `now` is time.monotonic().
        """
        for result in results:
            for output in result.outputs:
                generation_id = self._generation_ids.get(output.request_id)
                if generation_id is not None:
                    self._growing.setdefault(generation_id, _Growing()).take(output)
        if now - self._released_at >= self._interval_s():
            self._released_at = now
            released = [*self._growing.items()]
        else:
            released = [(id_, event) for id_, event in self._growing.items() if event.is_urgent or self._is_new(id_)]
        for generation_id, _ in released:
            del self._growing[generation_id]
        return [self._event(generation_id, event) for generation_id, event in released]

    def due_in(self, now: float) -> float | None:
        """Return the seconds until what has been held back is to be committed; None where nothing has."""
        if not self._growing:
            return None
        return max(0.0, self._released_at + self._interval_s() + _MAX_LATE_S - now)

    def _interval_s(self) -> float:
        wanted = min(_MAX_GATHER_S, len(self._growing) / self._max_events_per_s)
        return wanted if wanted >= _MIN_GATHER_S else 0.0

    def _is_new(self, generation_id: str) -> bool:
        return self._held[generation_id].kv_tokens > 0

    def _event(self, generation_id: str, event: _Growing) -> NewEvent:
        held, last = self._held[generation_id], event.last
        assert last is not None
        # Beams are counted while they are held back; the outputs among them are not counted once more.
        num_new = event.num_held_tokens if held.has_beams else sum(len(delta.token_ids) for delta in event.deltas)
        held.completion_tokens += num_new
        if event.deltas or num_new:
            held.kv_tokens = 0
        if last.usage is not None:
            held.cached_prompt_tokens = last.usage.cached_prompt_tokens
        deltas = event.deltas
        if held.ranking is not None:
            held.ranking.take(deltas)
            deltas = held.ranking.best() if last.usage is not None else []
        body = EventBody(tuple(merge_deltas(deltas)), last.usage, merge_scores(event.scores), last.result)
        # What is held back begins anew at a takeover: only what no attempt has come to before shows that the work goes
        # on. Else a request that ends its worker in the midst of its beams would do so without end.
        went_on = bool(body.deltas) or body.prompt_scores is not None or held.completion_tokens > held.furthest
        held.furthest = max(held.furthest, held.completion_tokens)
        terminal = JobState.FAILED if last.error is not None else JobState.DONE if last.finished else None
        if terminal is not None:
            self.drop(generation_id)
        return NewEvent(
            generation_id=generation_id,
            body=body,
            # Until the end the furthest, which the next attempt must know; at the end what it was.
            completion_tokens=held.furthest if terminal is None else held.completion_tokens,
            cached_prompt_tokens=held.cached_prompt_tokens,
            progress=went_on,
            terminal=terminal,
            reason=_reason_of(last.error),
        )

"""The engine of encoder models: requests with tasks in, whole answers out, a batch of texts at a time.

    take      texts by turns of their tenants, up to the token budget      queue.py
    run       texts of similar length together                            runner.py
    answer    of each request whose last text is computed                 answers.py

It stands in the place of `worker/engine/loop.py` for a worker's thread and agent. Nothing outlives a step but what was
computed of requests with more texts than one batch holds. Not thread-safe.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import structlog

from common.generation import Usage
from common.tasks import EncodedText
from worker.engine.runner import StepOutOfMemory
from worker.engine.types import DuplicateRequest, EngineStats, GenerationRequest, RequestOutput, StepResult
from worker.tasks.answers import answer, name_of
from worker.tasks.facts import EncoderFacts
from worker.tasks.labels import Array
from worker.tasks.queue import Pending, TextQueue, buckets
from worker.tasks.runner import EncoderModule, Text

_log = structlog.get_logger(__name__)

_MAX_WASTE: Final = 0.125  # of a batch's tokens, those that are padding


@dataclass(slots=True)
class _State:
    """A request in the engine."""

    pending: Pending
    outputs: list[Array | None]
    num_missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_missing = len(self.outputs)

    def take(self, index: int, output: Array) -> None:
        self.outputs[index] = output
        self.num_missing -= 1

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.pending.texts))


class TaskEngine:
    """Answers any number of requests together. Owns no thread and no I/O."""

    def __init__(
        self,
        module: EncoderModule,
        facts: EncoderFacts,
        *,
        vocab_size: int,
        max_tokens: int,
        token_budget: int,
        capacity: int,
    ) -> None:
        """`max_tokens` is of one text, `token_budget` of one batch, `capacity` of all requests that are held."""
        self._module = module
        self._facts = facts
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._token_budget = token_budget
        self._capacity = capacity
        self._queue = TextQueue()
        self._requests: dict[str, _State] = {}
        self._outputs: list[RequestOutput] = []  # of the step in progress
        self._num_steps = 0
        self._num_tokens = 0
        self._last_step_ms = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        return bool(self._requests or self._outputs)

    def prepare(self, request: GenerationRequest) -> GenerationRequest:
        """Nothing about a task takes long beforehand."""
        return request

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. One that can never run ends with an error in the next step.

        Raises DuplicateRequest for an id in use.
        """
        ended = {output.request_id for output in self._outputs}
        if request.request_id in self._requests or request.request_id in ended:
            raise DuplicateRequest(request.request_id)
        error, texts = self._read(request)
        if error is not None:
            self._fail(request.request_id, error)
            return
        state = self._requests[request.request_id] = _State(Pending(request, texts), [None] * len(texts))
        self._queue.add(state.pending)

    def _read(self, request: GenerationRequest) -> tuple[str | None, tuple[Text, ...]]:
        """Return why a request can never run, None if it can, and its texts."""
        task = request.task
        if task is None or name_of(task) not in self._facts.tasks:
            return "TASK_NOT_SERVED", ()
        texts = tuple(map(_text, task.texts))
        if not texts:
            return "EMPTY_PROMPT", ()
        for text in texts:
            if not 0 < len(text) <= self._max_tokens:
                return "PROMPT_TOO_LONG", ()
            if text.ids.min() < 0 or text.ids.max() >= self._vocab_size:
                return "INVALID_TOKEN_ID", ()
        return None, texts

    def abort(self, request_id: str) -> None:
        """Forget a request, in whatever state. Nothing is reported of it."""
        self._drop(request_id)

    def step(self, now: float) -> StepResult:
        """Compute one batch. `now` is what deadlines are compared with (`time.monotonic()`).

        A request whose deadline has passed is computed no further; the queue ends it.
        """
        started = time.perf_counter()
        self._num_steps += 1
        for request_id in [name for name, state in self._requests.items() if _is_late(state, now)]:
            self._drop(request_id)
        batch = self._queue.take(self._token_budget)
        lengths = [len(pending.texts[index]) for pending, index in batch]
        for group in buckets(lengths, _MAX_WASTE):
            self._run([batch[i] for i in group])
        duration_s = time.perf_counter() - started
        self._last_step_ms = duration_s * 1000
        outputs, self._outputs = self._outputs, []
        return StepResult(self._num_steps, tuple(outputs), duration_s, sum(lengths), len(lengths))

    def _run(self, texts: list[tuple[Pending, int]]) -> None:
        """Compute texts together; in halves where memory is short for all of them."""
        wanted = [(pending, index) for pending, index in texts if pending.request.request_id in self._requests]
        if not wanted:
            return
        try:
            outputs = self._module.run([pending.texts[index] for pending, index in wanted])
        except StepOutOfMemory:
            if len(wanted) == 1:
                self._fail(wanted[0][0].request.request_id, "OUT_OF_MEMORY")
                return
            middle = len(wanted) // 2
            self._run(wanted[:middle])
            self._run(wanted[middle:])
            return
        for (pending, index), output in zip(wanted, outputs, strict=True):
            self._take(pending, index, output)

    def _take(self, pending: Pending, index: int, output: Array) -> None:
        request_id = pending.request.request_id
        state = self._requests.get(request_id)
        if state is None:  # another of its texts has failed
            return
        self._num_tokens += len(output) if output.ndim > 1 else len(pending.texts[index])
        if not np.isfinite(output).all():
            self._fail(request_id, "NAN_LOGITS")
            return
        state.take(index, output)
        if state.num_missing:
            return
        assert pending.request.task is not None
        try:
            result = answer(pending.request.task, [one for one in state.outputs if one is not None], self._facts)
        except Exception as error:  # noqa: BLE001 - what one request's text does must not end all others
            _log.error("engine.answer_failed", request_id=request_id, error=type(error).__name__)
            self._fail(request_id, "ANSWER_FAILED")
            return
        usage = Usage(prompt_tokens=state.num_tokens)
        self._drop(request_id)
        self._outputs.append(RequestOutput(request_id, usage=usage, result=result))

    def _fail(self, request_id: str, error: str) -> None:
        self._drop(request_id)
        self._outputs.append(RequestOutput(request_id, error=error))

    def _drop(self, request_id: str) -> None:
        state = self._requests.pop(request_id, None)
        if state is not None:
            self._queue.remove(state.pending)

    def stats(self) -> EngineStats:
        """The state after the latest step. A block is a token here, of those that may be held: who hands requests in
        counts what they take, so that all stand as free.
        """
        num_running = sum(state.pending.next_text > 0 for state in self._requests.values())
        return EngineStats(
            num_steps=self._num_steps,
            num_running=num_running,
            num_waiting=len(self._requests) - num_running,
            num_blocks=self._capacity,
            num_free_blocks=self._capacity,
            block_size=1,
            prompt_tokens=self._num_tokens,
            last_step_ms=self._last_step_ms,
            held_request_ids=tuple(self._requests),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError when texts wait that no request has, or the other way round."""
        waiting = sum(len(state.pending.texts) - state.pending.next_text for state in self._requests.values())
        assert len(self._queue) == waiting, f"{len(self._queue)} texts wait, requests have {waiting}"


def _text(text: EncodedText) -> Text:
    ids = np.frombuffer(text.token_ids, dtype="<i4")
    return Text(ids, np.frombuffer(text.type_ids, dtype=np.uint8) if text.type_ids else None)


def _is_late(state: _State, now: float) -> bool:
    deadline = state.pending.request.deadline
    return deadline is not None and now >= deadline

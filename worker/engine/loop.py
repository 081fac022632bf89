"""The engine: requests in, deltas out, a step at a time.

    plan      the scheduler chooses the tokens of the step       scheduler.py, blocks.py
    launch    the model computes them, the sampler draws        batch.py, runner.py, attention/, sampler.py
    land      tokens become text, stops and deltas               stopping.py

On a GPU the next step is launched before one lands, see `flight.py`. Not thread-safe: everything runs on the thread
that calls `step` (see `thread.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol, TypeAlias

import msgspec
import torch

from common.generation import ChatParsing, FinishReason
from worker.engine.adapters.requests import release, unmet_adapter
from worker.engine.batch import TokensInFlight
from worker.engine.beam_request import BeamRequest, Continuations, continue_beams, without_beams
from worker.engine.blocks import BlockPool
from worker.engine.cost import UNMEASURED, CostModel, StepBudget
from worker.engine.flight import Flight
from worker.engine.grammar import Grammar, GrammarCompiler, GrammarFailure, MaskFiller
from worker.engine.refusals import refusal
from worker.engine.request_sequence import new_sequence
from worker.engine.request_state import OutputState, RequestState
from worker.engine.results import Results, end_delta, score_chunk, token_delta, valid_rows
from worker.engine.runner import StepOutOfMemory, memory_guard
from worker.engine.sampler import Argmax, SampledTokens, Sampler
from worker.engine.scheduler import BlockCopy, Chunk, Plan, Scheduler
from worker.engine.sequence import Sequence
from worker.engine.settings import EngineSettings
from worker.engine.speculation import Speculator, num_accepted
from worker.engine.stopping import Detokenizer, Progress, StopState, TextParser
from worker.engine.transfer import to_device
from worker.engine.types import (
    ALL_TOKENS_FORBIDDEN,
    DuplicateRequest,
    EngineStats,
    GenerationRequest,
    OnPart,
    StepResult,
    ignore_part,
)


class Runner(Protocol):
    """What the loop needs of a `ModelRunner`."""

    device: torch.device
    num_blocks: int  # scratch block included
    max_model_len: int  # tokens of one sequence
    max_source_tokens: int  # that an encoder reads for one; 0 without an encoder
    vocab_size: int

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None: ...
    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor: ...


# What makes the text of a chat's output, and what takes it apart.
ReadChat: TypeAlias = Callable[[ChatParsing], tuple[Detokenizer, TextParser]]


class Engine:
    """Decodes any number of generations together. Owns no thread and no I/O."""

    def __init__(
        self,
        runner: Runner,
        settings: EngineSettings,
        new_detokenizer: Callable[[], Detokenizer],
        *,
        cost: CostModel = UNMEASURED,
        cache_salt: bytes = b"",
        argmax: Argmax | None = None,
        grammars: GrammarCompiler | None = None,
        on_part: OnPart = ignore_part,
        read_chat: ReadChat | None = None,
        runs_ahead: bool | None = None,
    ) -> None:
        """`cost` is what the runner's steps cost; `cache_salt` stands for whatever else than tokens decides keys and
        values: model revision, adapter, dtype; `argmax` is the sampler's;
        `grammars` compiles structured outputs, without it requests with one end with an error;
        `on_part` is told of the parts of each step; `read_chat` makes what takes the answers of chats apart, and raises
        ValueError for a format that it does not know: such requests end with an error; `runs_ahead` is whether a step
        is launched before the one before it has landed, by default where the device computes by itself.
        """
        self._runner = runner
        self._runs_ahead = runner.device.type == "cuda" if runs_ahead is None else runs_ahead
        self._flight: Flight | None = None  # launched by the latest step, and not landed
        self._max_num_seqs = settings.max_num_seqs
        self._new_detokenizer = new_detokenizer
        self._on_part = on_part
        self._read_chat = read_chat
        self._pool = BlockPool(
            runner.num_blocks, settings.block_size, salt=cache_salt, enable_prefix_cache=settings.enable_prefix_cache
        )
        speculator = Speculator(settings, cost, runner.max_model_len) if settings.speculation else None
        self._scheduler = Scheduler(settings, self._pool, StepBudget(settings, cost), speculator)
        self._sampler = Sampler(runner.device, argmax)
        self._grammars = grammars
        self._masks = MaskFiller(grammars, runner.vocab_size) if grammars is not None else None
        self._requests: dict[str, RequestState] = {}
        self._results = Results()
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_generated_tokens = 0
        self._last_step_ms = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        return bool(self._requests or self._results)

    @property
    def max_model_len(self) -> int:
        return self._runner.max_model_len

    @property
    def max_source_tokens(self) -> int:
        """Of what an encoder reads for a request; 0 without an encoder."""
        return self._runner.max_source_tokens

    # -- requests -------------------------------------------------------------------------------------------------

    def prepare(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with its grammar compiled, which may take long: for any thread, before `add`."""
        spec = request.sampling.structured_output
        if spec is None or request.grammar is not None:
            return request
        if self._grammars is None:
            return replace(request, grammar=GrammarFailure("STRUCTURED_OUTPUT_UNSUPPORTED"))
        try:
            return replace(request, grammar=self._grammars.compile(spec))
        except GrammarFailure as failure:
            return replace(request, grammar=failure)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. One that can never run ends with an error in the next step.

        Raises DuplicateRequest for an id in use.
        """
        if request.request_id in self._requests or self._results.has_ended(request.request_id):
            release(request)
            raise DuplicateRequest(request.request_id)
        request = self.prepare(request)
        error = self._refusal(request)
        if error is not None:
            release(request)
            self._results.fail(request.request_id, error)
            return
        self._num_arrivals += 1
        state = self._requests[request.request_id] = RequestState(request)
        num_outputs = request.sampling.num_outputs if request.sampling.num_beams == 1 else 1
        emitted = request.emitted or ((),) * num_outputs
        for output_index, token_ids in enumerate(emitted):
            state.num_completion_tokens += len(token_ids)
            if output_index not in request.finished_outputs:
                try:
                    self._start_output(state, output_index, token_ids)
                except GrammarFailure as failure:  # by what the log holds already; nothing waits yet
                    release(self._requests.pop(request.request_id).request)
                    self._results.fail(request.request_id, str(failure))
                    return
        self._queue(state)
        self._end_if_done(state)

    def _queue(self, state: RequestState) -> None:
        """Let the outputs wait: those without a token together, since the prompt is all that they need."""
        sequences = [output.sequence for output in state.outputs.values()]
        fresh = [sequence for sequence in sequences if not sequence.num_output_tokens]
        if fresh and state.request.sampling.prompt_logprobs is not None:
            fresh[0].num_scored_tokens = max(1, state.request.num_scored_tokens)
        for sequence in sequences:
            if sequence.num_output_tokens:
                self._scheduler.add(sequence)
            elif sequence is fresh[0]:
                self._scheduler.add(sequence, fresh[1:])

    def _refusal(self, request: GenerationRequest) -> str | None:
        try:
            self._text_of(request)
        except ValueError:
            return "UNKNOWN_CHAT_FORMAT"
        return unmet_adapter(request) or refusal(
            request,
            vocab_size=self._runner.vocab_size,
            max_model_len=self._runner.max_model_len,
            max_num_seqs=self._max_num_seqs,
            kv_tokens=self._pool.num_usable_blocks * self._pool.block_size,
            block_size=self._pool.block_size,
            max_source_tokens=self._runner.max_source_tokens,
        )

    def _start_output(self, state: RequestState, output_index: int, emitted: tuple[int, ...]) -> None:
        request = state.request
        max_tokens = min(request.sampling.max_tokens, self._runner.max_model_len - len(request.prompt_token_ids))
        sampling = request.sampling
        if max_tokens < sampling.max_tokens:  # the token that is forced is the last one that there can be
            sampling = msgspec.structs.replace(sampling, max_tokens=max_tokens)
        matcher = request.grammar.matcher() if isinstance(request.grammar, Grammar) else None
        stop = StopState(sampling, max_tokens, *self._text_of(request), matcher)
        for token_id in emitted:
            if stop.finished is None:
                stop.push(token_id)
        if not max_tokens and request.sampling.prompt_logprobs is None:  # nothing to compute
            self._results.add(
                request.request_id, end_delta(output_index, 0, stop.end(FinishReason.LENGTH), request.echo_text)
            )
            return
        if stop.finished is not None:  # the log has the last token and its text, but not the end
            end = Progress("", stop.finished.finish_reason, stop.finished.stop_match)  # its parts are in the log too
            self._results.add(request.request_id, end_delta(output_index, len(emitted), end))
            return
        sequence = new_sequence(request, sampling, output_index, emitted, self._num_arrivals, matcher)
        state.first = state.first or sequence
        state.outputs[output_index] = OutputState(sequence, stop)
        if sampling.num_beams > 1:
            state.beams = BeamRequest(
                sequence,
                lambda: StopState(sampling, max_tokens, self._new_detokenizer()),
                lambda: StopState(sampling, max_tokens, *self._text_of(request)),
            )

    def _text_of(self, request: GenerationRequest) -> tuple[Detokenizer, TextParser | None]:
        """Return what makes an output's text. Raises ValueError."""
        if request.chat is None:
            return self._new_detokenizer(), None
        if self._read_chat is None:
            raise ValueError("chats are not taken apart here")
        return self._read_chat(request.chat)

    def abort(self, request_id: str) -> None:
        """End a request with CANCELLED, in whatever state; its blocks are free at once, the end is in the next step's
        result.

        Does nothing when the request is not in the engine.
        """
        state = self._requests.get(request_id)
        if state is not None:
            for output in list(state.outputs.values()):
                self._close(state, output, FinishReason.CANCELLED)

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self, now: float) -> StepResult:
        """Run one step. `now` is what deadlines are compared with (`time.monotonic()`)."""
        started = time.perf_counter()
        self._num_steps += 1
        self._on_part("plan")
        for sequence in self._scheduler.expired(now):
            state = self._requests[sequence.request_id]
            self._close(state, state.outputs[sequence.output_index], FinishReason.TIME_LIMIT)
        flight, self._flight = self._flight, None
        num_tokens = num_sequences = 0
        if flight is None:
            flight = self._launch()
        if flight is not None:
            if self._runs_ahead and flight.plan.is_predictable and not self._scheduler.would_draft(flight.plan.sampled):
                self._on_part("plan")
                self._flight = self._launch(flight.hold_places())
            self._on_part("update")
            self._land(flight)
            num_tokens, num_sequences = flight.plan.num_tokens, len(flight.plan.chunks)
        self._on_part("end")
        duration_s = time.perf_counter() - started
        self._last_step_ms = duration_s * 1000
        return StepResult(self._num_steps, self._results.take(), duration_s, num_tokens, num_sequences)

    def _launch(self, in_flight: TokensInFlight | None = None) -> Flight | None:
        """Plan a step and give it to the device. None when there is nothing to do, or memory was short."""
        plan = self._scheduler.plan()
        if plan.chunks:
            return self._execute(plan, in_flight)
        assert in_flight is not None or not self._requests, "sequences wait, but none can run"
        return None

    def _execute(self, plan: Plan, in_flight: TokensInFlight | None) -> Flight | None:
        """None when memory was short: the step is void, and the likeliest cause has been set aside."""
        if plan.copies and not self._copy_blocks(plan):
            return None
        indices = plan.sampled_indices
        rows = plan.logit_rows if indices is None else [*plan.logit_rows, *plan.forks]
        filling = self._masks.begin(rows) if self._masks is not None else None
        try:
            try:
                logits = self._runner.execute(plan, in_flight)
            finally:
                masks = filling.result() if filling is not None else None
            self._on_part("sample")
            with memory_guard():
                picked = logits if indices is None else logits[to_device(indices, logits.device)]
                continuations = continue_beams(picked, rows, lambda request_id: self._requests[request_id].beams)
                sampled = self._sampler.begin(picked, without_beams(rows), masks)
                scores = [score_chunk(chunk, scored, logits) for chunk, scored in plan.scored]
                self._scheduler.finish_step(plan)
                return Flight(plan, rows, sampled, scores, continuations)
        except StepOutOfMemory:
            self._scheduler.fail_step(plan)
            self._relieve(plan)
            return None

    def _copy_blocks(self, plan: Plan) -> bool:
        """False when memory was short: the step is void, and who needs a copy computes its tokens again instead."""
        try:
            self._runner.copy_blocks(plan.copies)
        except StepOutOfMemory:
            self._scheduler.fail_step(plan)
            for sequence in self._scheduler.fail_copies(plan):
                self._count_memory_failure(sequence)
            return False
        return True

    def _relieve(self, plan: Plan) -> None:
        """Requeue the newest prefill, or else the newest sequence; the second time that memory fails it, end it."""
        prefills = [chunk.sequence for chunk in plan.chunks if chunk.is_prefill]
        victim = max(prefills or [chunk.sequence for chunk in plan.chunks], key=lambda sequence: sequence.order)
        if self._count_memory_failure(victim.leader):
            self._scheduler.preempt(victim)

    def _count_memory_failure(self, sequence: Sequence) -> bool:
        """False when it was the second one of this sequence, which has ended its request."""
        sequence.num_memory_failures += 1
        if sequence.num_memory_failures > 1:
            self._fail(sequence.request_id, "OUT_OF_MEMORY")
        return sequence.num_memory_failures < 2

    def _is_live(self, sequence: Sequence) -> bool:
        """Whether what a step has computed of a sequence is wanted still."""
        state = self._requests.get(sequence.request_id)
        return state is not None and state.has(sequence)

    def _land(self, flight: Flight) -> None:
        """Wait for a step's tokens, and give them to their outputs: to those that have not ended meanwhile."""
        sampled, forks = flight.sampled.result(), flight.plan.forks
        for sequence in (flight.rows[row] for row in flight.sampled.redrawn_rows):
            if not isinstance(sequence, Sequence) or sequence in flight.void:
                continue
            if self._flight is not None and self._flight.has(sequence):
                self._flight.void.add(sequence)
                self._scheduler.take_back(sequence)
        for sequence, found in flight.scores:
            if self._is_live(sequence):
                sequence.num_scored_tokens = found.first_token_index + len(found.logprobs)
                self._results.scores[sequence.request_id] = found
        for request_id in [
            name for name, scores in self._results.scores.items() if any(map(math.isnan, scores.logprobs))
        ]:
            for output in self._requests[request_id].outputs.values():
                self._scheduler.forget_blocks(output.sequence)
            self._fail(request_id, "NAN_LOGITS")
        accepted: list[tuple[Chunk, range]] = []
        live: set[str] = set()
        forbidden = set(sampled.forbidden_rows)  # none of a draft: sequences whose scores are edited do not draft
        for chunk, rows in valid_rows(flight.plan, sampled):
            if chunk.sequence in flight.void or not self._is_live(chunk.sequence):
                continue
            live.add(chunk.sequence.request_id)
            if chunk.sequence.matcher is not None and chunk.sequence.matcher.failure is not None:
                self._fail(chunk.sequence.request_id, chunk.sequence.matcher.failure)
                continue
            if not rows:
                self._scheduler.forget_blocks(chunk.sequence)
                self._fail(chunk.sequence.request_id, "NAN_LOGITS")
                continue
            if rows[0] in forbidden or rows[0] in sampled.unmet_rows:
                error = ALL_TOKENS_FORBIDDEN if rows[0] in forbidden else "OUT_OF_MEMORY"
                self._fail(chunk.sequence.request_id, error)
                continue
            chosen = sampled.token_ids[rows.start : rows.stop - 1]
            accepted.append((chunk, rows[: 1 + num_accepted(chunk.drafts, chosen)]))
        first_fork_row = len(sampled.token_ids) - len(forks)
        for row, fork in enumerate(forks, first_fork_row):
            if fork.parent is not None and self._is_live(fork):
                self._scheduler.fork(fork.parent, fork)  # before the parent's first token may be its last
                accepted.append((Chunk(fork, 0, is_last=True), range(row, row + 1)))
        for chunk, rows in accepted:
            state = self._requests.get(chunk.sequence.request_id)
            if state is not None and state.beams is None:  # not failed in this step
                self._take_tokens(state, chunk, rows, sampled)
        for request_id, continuations in flight.continuations.items():
            state = self._requests.get(request_id)
            if request_id in live and state is not None and state.beams is not None:
                self._take_beams(state, state.beams, continuations)

    def _take_tokens(self, state: RequestState, chunk: Chunk, rows: range, sampled: SampledTokens) -> None:
        """Give an output the tokens of these rows, up to its end if that is among them."""
        sequence, output = chunk.sequence, state.outputs[chunk.sequence.output_index]
        if not sequence.sampling.max_tokens:  # it came for the prompt's scores
            self._close(state, output, FinishReason.LENGTH)
            return
        first_token_index = sequence.num_output_tokens - sequence.num_pending
        echo = "" if first_token_index else state.request.echo_text
        steps: list[Progress] = []
        for row in rows:
            sequence.append(sampled.token_ids[row])
            try:
                progress = output.stop.push(sampled.token_ids[row])
            except Exception as error:  # noqa: BLE001 - what one answer's text does must not end all others
                self._fail(sequence.request_id, str(error) if isinstance(error, GrammarFailure) else "TEXT_FAILED")
                return
            steps.append(progress)
            if progress.finish_reason is not None:
                break
        taken = rows[: sequence.num_output_tokens - first_token_index]
        state.num_completion_tokens += len(taken)
        self._num_generated_tokens += len(taken)
        delta = token_delta(sequence, first_token_index, taken, sampled, steps, echo)
        self._results.add(sequence.request_id, delta)
        if chunk.drafts:
            self._scheduler.accept_drafts(sequence, len(taken) - 1)
        elif self._flight is not None:
            self._scheduler.register_known(sequence)
        if progress.finish_reason is not None:
            self._drop(state, output)

    def _take_beams(self, state: RequestState, beams: BeamRequest, found: Continuations) -> None:
        """Let a request's search take a step."""
        going = beams.advance(found)
        num_new = beams.num_tokens - state.num_completion_tokens
        state.num_completion_tokens += num_new
        self._num_generated_tokens += num_new
        self._results.hold(state.request.request_id, num_new)
        if not beams.is_done:
            self._scheduler.regroup(beams.group, going)
        elif beams.best(is_cut=False):
            self._close(state, state.outputs[0])
        else:
            self._fail(state.request.request_id, ALL_TOKENS_FORBIDDEN)

    # -- ends -----------------------------------------------------------------------------------------------------

    def _close(self, state: RequestState, output: OutputState, reason: FinishReason | None = None) -> None:
        """End an output from outside; without a reason, a search that is done."""
        sequence, request_id = output.sequence, state.request.request_id
        if state.beams is not None:
            for delta in state.beams.deltas(reason, state.request.echo_text):
                self._results.add(request_id, delta)
            self._drop(state, output)
            return
        assert reason is not None
        end = output.stop.end(reason)
        echo_text = "" if sequence.num_output_tokens else state.request.echo_text
        delta = end_delta(sequence.output_index, sequence.num_output_tokens, end, echo_text)
        self._results.add(sequence.request_id, delta)
        self._drop(state, output)

    def _drop(self, state: RequestState, output: OutputState) -> None:
        self._scheduler.remove(output.sequence)
        del state.outputs[output.sequence.output_index]
        self._end_if_done(state)

    def _end_if_done(self, state: RequestState) -> None:
        if not state.outputs:
            self._results.end(state.request.request_id, state.usage)
            release(self._requests.pop(state.request.request_id).request)

    def _fail(self, request_id: str, error: str) -> None:
        state = self._requests.pop(request_id, None)
        if state is None:  # another of its outputs failed in the same step
            return
        for output in state.outputs.values():
            self._scheduler.remove(output.sequence)
        release(state.request)
        self._results.fail(request_id, error)

    # -- state ----------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """The state after the latest step."""
        scheduler, pool = self._scheduler, self._pool
        return EngineStats(
            num_steps=self._num_steps,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=pool.num_usable_blocks,
            num_free_blocks=pool.num_free_blocks,
            block_size=pool.block_size,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_prompt_tokens=scheduler.num_cached_prompt_tokens,
            generated_tokens=self._num_generated_tokens,
            last_step_ms=self._last_step_ms,
            held_request_ids=tuple(self._requests),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError when blocks are lost or held twice."""
        self._scheduler.check_integrity()

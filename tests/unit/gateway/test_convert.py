"""What callers see of a record: states, ends, timings, failures."""

from __future__ import annotations

import re
from typing import Any

import pytest

from common.deltas import merge_tool_calls
from common.errors import DeadlineExceeded, FailedPrecondition, InvalidRequest, LogLimitExceeded, WorkerFailed
from common.generation import EventBody, FinishReason, OutputDelta, PromptScores, ToolCallDelta, Usage
from common.jobs import ItemKind, JobState, Reason
from gateway import convert
from gateway.progress import LogPosition, Verdict
from gateway.stream import accepted_of
from tests.builders_gateway import GENERATION_ID, chained, item_of, make_record, news
from torchrelay.v1 import generation_pb2 as pb


@pytest.mark.parametrize(
    ("state", "started_ms", "expected"),
    [
        (JobState.QUEUED, 0, pb.GENERATION_STATE_QUEUED),
        (JobState.QUEUED, 5, pb.GENERATION_STATE_RECOVERING),
        (JobState.RUNNING, 5, pb.GENERATION_STATE_RUNNING),
        (JobState.DONE, 5, pb.GENERATION_STATE_FINISHED),
        (JobState.FAILED, 5, pb.GENERATION_STATE_FAILED),
        (JobState.CANCELLED, 0, pb.GENERATION_STATE_CANCELLED),
        (JobState.EXPIRED, 0, pb.GENERATION_STATE_EXPIRED),
        (JobState.EXPIRED, 5, pb.GENERATION_STATE_FINISHED),
    ],
)
def test_states_as_callers_see_them(state: JobState, started_ms: int, expected: int) -> None:
    assert convert.state_of(make_record(state, started_ms=started_ms)) == expected


@pytest.mark.parametrize("state", JobState)
def test_only_failures_are_errors(state: JobState) -> None:
    started = convert.failure_of(make_record(state))
    assert (started is not None) == (state is JobState.FAILED)
    unstarted = convert.failure_of(make_record(state, started_ms=0))
    assert (unstarted is not None) == (state in (JobState.FAILED, JobState.EXPIRED))


def test_failures_say_why() -> None:
    exhausted = convert.failure_of(make_record(JobState.FAILED, reason=Reason.ATTEMPTS_EXHAUSTED))
    assert isinstance(exhausted, WorkerFailed)
    assert exhausted.metadata == {"detail": "ATTEMPTS_EXHAUSTED"}
    assert isinstance(convert.failure_of(make_record(JobState.FAILED, reason=Reason.LOG_LIMIT)), LogLimitExceeded)
    assert isinstance(convert.failure_of(make_record(JobState.EXPIRED, started_ms=0)), DeadlineExceeded)
    config = pb.GenerationConfig(structured_output=pb.StructuredOutput(regex="a"))
    for echo, field in (
        (pb.Accepted(config=config), "config.structured_output"),
        (pb.Accepted(), "input.chat.tools"),  # nothing else constrains an output
    ):
        record = make_record(JobState.FAILED, reason=Reason.GRAMMAR_STUCK, echo=echo.SerializeToString())
        stuck = convert.failure_of(record)
        assert isinstance(stuck, InvalidRequest)
        assert (stuck.reason, stuck.violations[0].field) == ("GRAMMAR_STUCK", field)
    unsupported = convert.failure_of(make_record(JobState.FAILED, reason=Reason.STRUCTURED_OUTPUT_UNSUPPORTED))
    assert isinstance(unsupported, FailedPrecondition)


def test_timings_are_measured_from_acceptance() -> None:
    timings = convert.timings_message(make_record(JobState.DONE, num_claims=3))
    assert (timings.queue_time.ToMilliseconds(), timings.time_to_first_token.ToMilliseconds()) == (250, 300)
    assert (timings.total_time.ToMilliseconds(), timings.num_takeovers) == (1000, 2)


def test_what_never_happened_has_no_time() -> None:
    record = make_record(JobState.CANCELLED, started_ms=0, first_token_ms=0, num_claims=0, ended_ms=999)
    timings = convert.timings_message(record)
    assert not timings.HasField("queue_time")
    assert not timings.HasField("time_to_first_token")
    assert (timings.total_time.ToMilliseconds(), timings.num_takeovers) == (0, 0)


def delta(index: int = 0, first: int = 0, ids: tuple[int, ...] = (), text: str = "", **fields: Any) -> OutputDelta:
    return OutputDelta(index, first, ids, text, **fields)


def test_tokens_bear_the_position_that_they_lead_to() -> None:
    deltas = [delta(ids=(1, 2), text="ab", logprobs=(-0.5, -1.0))]
    event = convert.deltas_event(deltas, LogPosition(4, b"12345678"), "g")
    assert event == pb.GenerationEvent(
        sequence=4,
        chain_hash=b"12345678",
        deltas=pb.Deltas(deltas=[pb.Delta(token_ids=[1, 2], text="ab", logprobs=[-0.5, -1.0])]),
    )


@pytest.mark.parametrize("deltas", [[], [delta(finish_reason=FinishReason.STOP)]])
def test_nothing_new_is_no_event(deltas: list[OutputDelta]) -> None:
    assert convert.deltas_event(deltas, LogPosition(), "g") is None


def test_ids_without_text_and_text_without_ids_are_both_news() -> None:
    event = convert.deltas_event([delta(0, ids=(5,)), delta(1, 3, text="é")], LogPosition(), "g")
    assert event is not None
    assert [(d.output_index, list(d.token_ids), d.text) for d in event.deltas.deltas] == [(0, [5], ""), (1, [], "é")]


def test_reasoning_and_calls_are_news_too_and_a_call_has_one_id_wherever_it_is_read() -> None:
    pieces = [ToolCallDelta(0, "f"), ToolCallDelta(0, arguments='{"a"')], [ToolCallDelta(0, arguments=": 1}")]
    streamed = [
        convert.deltas_event([delta(1, tool_calls=tuple(calls))], LogPosition(), GENERATION_ID) for calls in pieces
    ]
    calls = [call for event in streamed if event is not None for d in event.deltas.deltas for call in d.tool_calls]
    call_id = calls[0].id
    assert re.fullmatch("[A-Za-z0-9]{9}", call_id)
    assert [(c.index, c.id, c.name, c.arguments) for c in calls] == [
        (0, call_id, "f", ""),
        (0, "", "", '{"a"'),
        (0, "", "", ": 1}"),
    ]
    thought = convert.deltas_event([delta(reasoning_text="so")], LogPosition(), GENERATION_ID)
    assert thought is not None
    assert thought.deltas.deltas[0].reasoning_text == "so"
    whole = delta(1, text="x", reasoning_text="so", tool_calls=merge_tool_calls([*pieces[0], *pieces[1]]))
    accepted = pb.Accepted(config=pb.GenerationConfig(num_outputs=2))
    output = convert.generation_message(make_record(), accepted, [whole], LogPosition()).outputs[1]
    assert (output.text, output.reasoning_text) == ("x", "so")
    assert list(output.tool_calls) == [pb.ToolCall(id=call_id, name="f", arguments='{"a": 1}')]
    others = [(GENERATION_ID, 0, 0), (GENERATION_ID, 1, 1), ("other", 1, 0)]
    assert len({call_id, *(convert.tool_call_id(*where) for where in others)}) == 4


def test_an_output_that_ended_by_calls_says_so() -> None:
    end = convert.output_end(delta(finish_reason=FinishReason.TOOL_CALLS))
    assert end == pb.OutputEnd(finish_reason=pb.FINISH_REASON_TOOL_CALLS)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (None, pb.OutputEnd(finish_reason=pb.FINISH_REASON_STOP)),
        ("\n\n", pb.OutputEnd(finish_reason=pb.FINISH_REASON_STOP, stop="\n\n")),
        (0, pb.OutputEnd(finish_reason=pb.FINISH_REASON_STOP, stop_token_id=0)),
    ],
)
def test_an_end_says_what_ended_it(match: str | int | None, expected: pb.OutputEnd) -> None:
    assert convert.output_end(delta(finish_reason=FinishReason.STOP, stop_match=match)) == expected


@pytest.mark.parametrize("reason", FinishReason)
def test_every_finish_reason_has_its_name(reason: FinishReason) -> None:
    end = convert.output_end(delta(finish_reason=reason))
    assert pb.FinishReason.Name(end.finish_reason) == f"FINISH_REASON_{reason.name}"


@pytest.mark.parametrize(
    ("state", "expected"),
    [(JobState.CANCELLED, pb.FINISH_REASON_CANCELLED), (JobState.EXPIRED, pb.FINISH_REASON_TIME_LIMIT)],
)
def test_outputs_that_did_not_end_end_with_their_generation(state: JobState, expected: int) -> None:
    position = LogPosition(3, b"12345678")
    position.note_ends([delta(0, finish_reason=FinishReason.LENGTH), delta(1)])
    finished = convert.finished_event(make_record(state), position, 2).finished
    assert [end.output_index for end in finished.outputs] == [0, 1]
    assert [end.finish_reason for end in finished.outputs] == [pb.FINISH_REASON_LENGTH, expected]
    assert finished.usage == pb.Usage(prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=5)


def test_a_place_counts_those_before() -> None:
    waiting = make_record(JobState.QUEUED, place=3)
    assert convert.progress_event(waiting, LogPosition()).progress.place == 2
    assert not convert.progress_event(make_record(), LogPosition()).progress.HasField("place")


def test_an_expected_wait_is_set_where_it_is_known() -> None:
    waiting = make_record(JobState.QUEUED, place=3, expected_wait_ms=1500)
    assert convert.progress_event(waiting, LogPosition()).progress.expected_wait.ToMilliseconds() == 1500
    unknown = make_record(JobState.QUEUED, place=3)
    assert not convert.progress_event(unknown, LogPosition()).progress.HasField("expected_wait")
    accepted = accepted_of(waiting)
    assert (accepted.place, accepted.expected_wait.ToMilliseconds()) == (2, 1500)
    assert not accepted_of(make_record()).HasField("expected_wait")


def test_a_generation_shows_all_that_its_log_holds() -> None:
    accepted = pb.Accepted(model="tiny", model_revision="r1", config=pb.GenerationConfig(num_outputs=2, max_tokens=4))
    position = LogPosition(2, b"12345678")
    position.note_ends([delta(0, finish_reason=FinishReason.STOP)])
    running = convert.generation_message(make_record(), accepted, [delta(0, 0, (7, 8), "ab")], position)
    assert [(list(o.token_ids), o.text, o.HasField("end")) for o in running.outputs] == [
        ([7, 8], "ab", True),
        ([], "", False),
    ]
    assert (running.model, running.last_sequence, running.chain_hash) == ("tiny", 2, b"12345678")
    assert not running.HasField("timings")
    record = make_record(JobState.FAILED, usage=Usage(1, 0, 2))
    failed = convert.generation_message(record, accepted, [], position)
    assert (failed.state, failed.error_reason) == (pb.GENERATION_STATE_FAILED, "WORKER_FAILED")
    assert failed.HasField("timings")
    assert not failed.outputs[1].HasField("end")
    forbidden = convert.failure_of(make_record(JobState.FAILED, reason=Reason.ALL_TOKENS_FORBIDDEN))
    assert isinstance(forbidden, InvalidRequest)
    assert (forbidden.reason, forbidden.violations[0].field) == ("ALL_TOKENS_FORBIDDEN", "config")


def test_what_is_reported_of_tokens_reaches_callers_unchanged() -> None:
    part = OutputDelta(0, 0, (7,), "a", (-0.5,), top_logprobs=(((7, -0.5), (8, -1.5)),), ranks=(1,))
    end = OutputDelta(0, 1, finish_reason=FinishReason.LENGTH, score=-0.5)
    message = convert.delta_message(part, GENERATION_ID)
    assert message.top_logprobs == [pb.TokenAlternatives(token_ids=[7, 8], logprobs=[-0.5, -1.5])]
    assert message.ranks == [1]
    assert convert.output_end(end).score == -0.5
    assert not convert.output_end(delta(finish_reason=FinishReason.LENGTH)).HasField("score")
    scores = PromptScores(1, (-0.25,), (3,), (((4, -0.25),),))
    expected = pb.PromptScores(
        first_token_index=1,
        logprobs=[-0.25],
        ranks=[3],
        top_logprobs=[pb.TokenAlternatives(token_ids=[4], logprobs=[-0.25])],
    )
    event = convert.scores_event(scores, LogPosition(2, b"12345678"))
    assert (event.sequence, event.chain_hash, event.prompt_scores) == (2, b"12345678", expected)
    accepted = pb.Accepted(config=pb.GenerationConfig(num_outputs=1))
    whole = convert.generation_message(make_record(), accepted, [part], LogPosition(2, b"12345678"), scores)
    assert whole.prompt_scores == expected
    assert (whole.outputs[0].top_logprobs, whole.outputs[0].ranks) == (message.top_logprobs, [1])


def test_a_position_drops_old_copies_and_asks_for_what_is_missing() -> None:
    log = chained([(2, EventBody((delta(ids=(1,), first=n),))) for n in range(3)])
    position = LogPosition()
    assert position.judge(item_of(log[1])) is Verdict.READ_LOG
    assert position.judge(item_of(log[0], with_body=False)) is Verdict.READ_LOG
    assert position.judge(item_of(log[0])) is Verdict.DELIVER
    position.advance(log[0])
    assert position.judge(item_of(log[0])) is Verdict.DROP
    assert position.judge(news(ItemKind.REQUEUED, log[0])) is Verdict.NEWS
    assert position.judge(news(ItemKind.STARTED, log[1])) is Verdict.READ_LOG
    position.epoch = 3
    assert position.judge(news(ItemKind.REQUEUED, log[0])) is Verdict.DROP

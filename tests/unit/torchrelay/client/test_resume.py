"""The pure part: positions after any history, pauses, and what is tried again."""

from __future__ import annotations

import random

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.torchrelay.toy import GENERATION_ID, digest, words
from torchrelay.client import RelayError, RetryPolicy, StreamPosition
from torchrelay.v1 import generation_pb2 as pb

ACCEPTED = pb.GenerationEvent(accepted=pb.Accepted(generation_id=GENERATION_ID))
BROKEN = grpc.StatusCode.UNAVAILABLE


def broken() -> RelayError:
    return RelayError(BROKEN, "reset")


@given(
    num_events=st.integers(0, 8),
    cuts=st.lists(st.integers(0, 9), max_size=6),
    pauses=st.lists(st.floats(0, 1), max_size=40),
)
def test_any_history_of_events_and_failures_shows_each_event_once(
    num_events: int, cuts: list[int], pauses: list[float]
) -> None:
    log = words(num_events)
    position = StreamPosition(RetryPolicy(), random.Random(1))
    now, shown = 0.0, []
    for cut in [*cuts, 1 << 30]:
        resume = position.resume_request()
        after = 0 if resume is None else resume.after_sequence
        if resume is not None:
            assert (resume.generation_id, resume.chain_hash) == (GENERATION_ID, digest(after))
        events = [ACCEPTED, *(event for event in log if event.sequence > after)]
        for event in events[:cut]:
            now += pauses.pop() if pauses else 0.0
            if position.on_event(event, now):
                shown.append(event)
        if position.finished:
            break
        now += position.on_error(broken(), now)
    assert shown == [ACCEPTED, *log]
    assert position.sequence == num_events + 1


@given(attempt=st.integers(0, 10_000), seed=st.integers(), initial=st.floats(0.001, 1), longest=st.floats(0.001, 60))
def test_pauses_grow_to_their_bound(attempt: int, seed: int, initial: float, longest: float) -> None:
    policy = RetryPolicy(initial_delay_s=initial, max_delay_s=longest)
    assert 0 <= policy.delay(attempt, random.Random(seed)) <= min(longest, initial * 2 ** min(attempt, 32))


class Longest(random.Random):
    """Draws the upper bound."""

    def uniform(self, a: float, b: float) -> float:
        return b


def test_pauses_double_and_begin_anew_after_an_event() -> None:
    position = StreamPosition(RetryPolicy(initial_delay_s=1, max_delay_s=5), Longest())
    assert [position.on_error(broken(), 0) for _ in range(4)] == [1, 2, 4, 5]
    position.on_event(ACCEPTED, 0)
    assert position.on_error(broken(), 0) == 1


@pytest.mark.parametrize(
    "event",
    [ACCEPTED, pb.GenerationEvent(progress=pb.Progress(state=pb.GENERATION_STATE_QUEUED))],
    ids=["Accepted again", "Progress"],
)
def test_what_a_resumed_stream_repeats_does_not_make_the_client_hurry(event: pb.GenerationEvent) -> None:
    position = StreamPosition(RetryPolicy(initial_delay_s=1, max_delay_s=5), Longest())
    position.on_event(ACCEPTED, 0)
    delays = []
    for _ in range(3):
        delays.append(position.on_error(broken(), 0))
        position.on_event(event, 0)
    assert delays == [1, 2, 4]


def test_a_server_is_given_up_after_a_time_without_events() -> None:
    position = StreamPosition(RetryPolicy(initial_delay_s=1, max_delay_s=1, give_up_after_s=10), Longest())
    position.on_event(ACCEPTED, 100)
    assert position.on_error(broken(), 109) == 1
    error = broken()
    with pytest.raises(RelayError) as raised:
        position.on_error(error, 109.5)
    assert raised.value is error
    assert error.generation_id == GENERATION_ID


def test_a_server_that_never_answered_may_be_given_up_sooner() -> None:
    policy = RetryPolicy(initial_delay_s=1, max_delay_s=1, first_contact_s=2)
    position = StreamPosition(policy, Longest())
    assert position.on_error(broken(), 50) == 1
    with pytest.raises(RelayError):
        position.on_error(broken(), 51.5)
    answered = StreamPosition(policy, Longest())
    answered.on_event(ACCEPTED, 50)
    assert answered.on_error(broken(), 60) == 1


def test_a_server_s_own_delay_is_waited_for() -> None:
    full = RelayError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_delay_s=3.0)
    policy = RetryPolicy(initial_delay_s=1, max_delay_s=2)
    assert StreamPosition(policy, Longest()).on_error(full, 0) == 4.0, "and some more, so that not all come at once"
    delays = {StreamPosition(policy, random.Random(seed)).on_error(full, 0) for seed in range(20)}
    assert len(delays) == 20
    assert min(delays) >= 3.0


def test_a_server_s_own_delay_beyond_the_patience_is_an_error_at_once() -> None:
    full = RelayError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_delay_s=3.0)
    position = StreamPosition(RetryPolicy(first_contact_s=8))
    now = 0.0
    for _ in range(2):
        now += position.on_error(full, now)
    assert now >= 6
    with pytest.raises(RelayError):
        position.on_error(full, now)


def test_a_caller_that_was_too_slow_goes_on_after_what_it_has_read() -> None:
    position = StreamPosition(RetryPolicy())
    too_slow = RelayError(grpc.StatusCode.ABORTED, "x", reason="CLIENT_TOO_SLOW")
    with pytest.raises(RelayError):
        position.on_error(too_slow, 0)  # nothing that could be resumed
    position.on_event(ACCEPTED, 0)
    assert position.on_error(too_slow, 0) >= 0
    for other in ("SUPERSEDED", "RESULT_LOST"):
        with pytest.raises(RelayError):
            position.on_error(RelayError(grpc.StatusCode.ABORTED, "x", reason=other), 0)


@pytest.mark.parametrize("code", grpc.StatusCode, ids=lambda code: code.name)
@pytest.mark.parametrize("reason", ["", "SOME_REASON"])
@pytest.mark.parametrize("retry_delay_s", [None, 0.5])
def test_only_what_is_safe_is_tried_again(code: grpc.StatusCode, reason: str, retry_delay_s: float | None) -> None:
    error = RelayError(code, "x", reason=reason, retry_delay_s=retry_delay_s)
    lost = not reason and code.name in {"UNAVAILABLE", "UNKNOWN", "INTERNAL", "CANCELLED"}
    full = code is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_delay_s is not None
    assert error.is_retryable == (lost or full or code is grpc.StatusCode.UNAVAILABLE)
    position = StreamPosition(RetryPolicy())
    if error.is_retryable:
        assert position.on_error(error, 0) >= 0
    else:
        with pytest.raises(RelayError):
            position.on_error(error, 0)

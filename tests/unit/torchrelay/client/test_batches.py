"""Results of a batch across any history of broken streams, and what of it is tried again. Pure."""

from __future__ import annotations

import random

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.client import RelayError, ResultPosition, RetryPolicy
from torchrelay.client.batches import batch_requests, make_batch_header
from torchrelay.v1 import batch_pb2 as pb
from torchrelay.v1 import generation_pb2

RESETS = RelayError(grpc.StatusCode.UNAVAILABLE, "reset")


def told(num_results: int, total: int) -> pb.StreamBatchResultsResponse:
    state = pb.BATCH_STATE_DONE if num_results == total else pb.BATCH_STATE_RUNNING
    counts = pb.BatchCounts(total=total, succeeded=num_results)
    return pb.StreamBatchResultsResponse(batch=pb.Batch(batch_id="b", state=state, counts=counts))


def result(index: int) -> pb.StreamBatchResultsResponse:
    return pb.StreamBatchResultsResponse(result=pb.BatchResult(index=index, custom_id=f"c{index}"))


@given(total=st.integers(1, 8), cuts=st.lists(st.integers(0, 10), max_size=6), repeats=st.integers(0, 2))
def test_each_result_is_shown_once_and_in_order(total: int, cuts: list[int], repeats: int) -> None:
    position = ResultPosition(RetryPolicy(), "b", rng=random.Random(1))
    shown: list[int] = []
    now = 0.0
    for cut in [*cuts, 1 << 30]:
        after = position.request().after_index
        assert after == len(shown)
        first = max(0, after - repeats)  # a server that sends some once more
        events = [told(after, total), *(result(index) for index in range(first + 1, total + 1)), told(total, total)]
        for event in events[:cut]:
            found = position.on_event(event, now)
            if found is not None:
                shown.append(found.index)
        if position.finished:
            break
        now += position.on_error(RESETS, now)
    assert position.finished
    assert shown == list(range(1, total + 1))


def test_a_batch_that_ended_is_not_finished_before_all_its_results_were_read() -> None:
    position = ResultPosition(RetryPolicy(), "b")
    position.on_event(told(3, 3), 0.0)
    assert not position.finished
    for index in (1, 2, 3):
        position.on_event(result(index), 0.0)
    assert position.finished


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.PERMISSION_DENIED]
)
def test_what_cannot_be_read_is_not_asked_for_again(code: grpc.StatusCode) -> None:
    error = RelayError(code, "no", "REASON")
    with pytest.raises(RelayError) as raised:
        ResultPosition(RetryPolicy(), "b").on_error(error, 0.0)
    assert raised.value is error


def test_patience_ends_without_news_and_news_renew_it() -> None:
    policy = RetryPolicy(initial_delay_s=0.0, max_delay_s=0.0, give_up_after_s=10.0, first_contact_s=2.0)
    position = ResultPosition(policy, "b")
    position.on_error(RESETS, 0.0)
    with pytest.raises(RelayError):
        position.on_error(RESETS, 2.1)
    position = ResultPosition(policy, "b")
    position.on_event(told(0, 3), 0.0)
    position.on_error(RESETS, 9.0)
    position.on_event(told(0, 3), 9.5)
    position.on_error(RESETS, 19.0)
    with pytest.raises(RelayError):
        position.on_error(RESETS, 19.6)
    assert position.num_resumes == 2


def test_a_header_comes_first_and_always_has_a_key() -> None:
    items = [pb.BatchItem(custom_id=name) for name in "ab"]
    header = make_batch_header(priority="normal", display_name="n")
    first, *rest = batch_requests(header, items)
    assert first.header.idempotency_key != make_batch_header().idempotency_key != ""
    assert (first.header.priority, first.header.display_name) == (generation_pb2.PRIORITY_NORMAL, "n")
    assert [part.item for part in rest] == items
    with pytest.raises(ValueError, match="urgent"):
        make_batch_header(priority="urgent")  # type: ignore[arg-type]

"""What an item may be, and how results and batches look to callers."""

from __future__ import annotations

from typing import Any

import pytest
from google.rpc import status_pb2

from common import errors
from common.batches import BatchRecord, BatchState, Outcome, Owner, has_bit
from common.grants import Grants
from gateway.batches import items
from gateway.identity.caller import Caller
from torchrelay.v1 import batch_pb2 as pb
from torchrelay.v1 import classification_pb2 as cpb
from torchrelay.v1 import generation_pb2

RULES = items.ItemRules(frozenset({"generate", "classify"}), reveal_models=False)
REQUEST = cpb.ClassifyRequest(model="m")


def caller(**grants: Any) -> Caller:
    return Caller("acme", "k1", Grants(**grants))


def record(**fields: Any) -> BatchRecord:
    known: dict[str, Any] = {
        "batch_id": "b", "owner": Owner("acme", "k1"), "state": BatchState.RUNNING, "is_deleted": False, "total": 10,
        "num_succeeded": 3, "num_failed": 2, "num_cancelled": 0, "num_running": 4, "fed_below": 9, "epoch": 1,
        "created_ms": 1000, "deadline_ms": 9000, "ended_ms": 0, "retention_ms": 500, "priority": 2,
        "display_name": "n", "salt": "s",
    }  # fmt: skip
    return BatchRecord(**{**known, **fields})


@pytest.mark.parametrize(
    ("wanted", "allowed", "given"),
    [(0, (0, 1, 2), 2), (0, (0, 1), 1), (0, (0,), 0), (1, (0, 2), 0), (2, (1, 2), 1), (3, (2,), 2)],
)
def test_a_batch_has_the_lowest_priority_that_its_key_allows_unless_it_says(
    wanted: int, allowed: tuple[int, ...], given: int
) -> None:
    assert items.priority_of(wanted, caller(priorities=allowed)) == given


@pytest.mark.parametrize(("wanted", "allowed"), [(1, (1, 2)), (3, (0,)), (0, ())])
def test_a_priority_that_the_key_does_not_allow_is_refused(wanted: int, allowed: tuple[int, ...]) -> None:
    with pytest.raises(errors.PermissionDenied):
        items.priority_of(wanted, caller(priorities=allowed))


def test_each_kind_asks_for_its_scope_and_a_hidden_model_does_not_exist() -> None:
    item = pb.BatchItem(classify=REQUEST)
    items.check_item(item, 0, caller(), RULES)
    with pytest.raises(errors.PermissionDenied) as denied:
        items.check_item(item, 3, caller(scopes=("batch", "generate")), RULES)
    assert denied.value.metadata == {"scope": "tasks", "field": "items[3].classify"}
    with pytest.raises(errors.ModelNotFound):
        items.check_item(item, 3, caller(models=("other",)), RULES)
    with pytest.raises(errors.InvalidRequest) as refused:
        items.check_item(pb.BatchItem(rerank=cpb.RerankRequest(model="m")), 3, caller(), RULES)
    assert (refused.value.reason, refused.value.metadata["field"]) == ("UNSUPPORTED", "items[3].rerank")


@pytest.mark.parametrize("name", ["idempotency_key", "priority"])
def test_what_the_batch_decides_no_item_does(name: str) -> None:
    request = cpb.ClassifyRequest(model="m", **{name: "k" if name == "idempotency_key" else 1})  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidRequest) as refused:
        items.check_item(pb.BatchItem(classify=request), 7, caller(), RULES)
    assert refused.value.metadata["field"] == f"items[7].classify.{name}"


def test_an_error_is_the_status_of_a_call_byte_by_byte() -> None:
    error = errors.RateLimited("spent", subject="key:tokens", limit=3, retry_after_ms=1500)
    message = items.error_message(error, generation_pb2.Usage(prompt_tokens=4))
    status = status_pb2.Status.FromString(message.SerializeToString())
    assert (status.code, status.message) == (8, "spent")
    assert [detail.TypeName().rpartition(".")[2] for detail in status.details] == [
        "ErrorInfo",
        "RetryInfo",
        "QuotaFailure",
        "Usage",
    ]


def test_results_bear_their_items_names_and_places() -> None:
    item = pb.BatchItem(custom_id="mine", classify=REQUEST)
    stored = items.response_result(5, item, cpb.ClassifyResponse(generation_id="g"))
    message = items.result_message(9, stored.body)
    assert (stored.outcome, message.index, message.item_index, message.custom_id) == (Outcome.SUCCEEDED, 9, 5, "mine")
    assert message.classify.generation_id == "g"
    unnamed = items.cancelled_result(6, pb.BatchItem(classify=REQUEST))
    message = items.result_message(10, unnamed.body)
    assert (unnamed.outcome, message.custom_id, message.error.code) == (Outcome.CANCELLED, "6", 1)


def test_counts_add_up_to_the_total_whatever_its_feeder_said_last() -> None:
    for running in (0, 4, 99):
        counts = items.batch_message(record(num_running=running)).counts
        parts = (counts.waiting, counts.running, counts.succeeded, counts.failed, counts.cancelled)
        assert parts == (5 - min(running, 5), min(running, 5), 3, 2, 0)
        assert sum(parts) == counts.total
    running_batch = items.batch_message(record())
    assert running_batch.expire_time.ToMilliseconds() == 9000
    assert not running_batch.HasField("end_time")
    ended = items.batch_message(record(state=BatchState.DONE, num_succeeded=8, num_running=4, ended_ms=2000))
    assert (ended.counts.running, ended.counts.waiting) == (0, 0)
    assert (ended.end_time.ToMilliseconds(), ended.expire_time.ToMilliseconds()) == (2000, 2500)


def test_bits_are_counted_from_the_highest_of_the_first_byte() -> None:
    assert [has_bit(b"\x81\x40", index) for index in range(17)] == [index in (0, 7, 9) for index in range(17)]

"""What a worker counts of its generations: each once, where it ends, with times from its acceptance on."""

from __future__ import annotations

import pytest
from msgspec import structs
from prometheus_client import CollectorRegistry

from common.generation import EventBody, FinishReason, JobBody, OutputDelta, SamplingParams
from common.jobs import JobState, NewEvent, Reason
from common.tasks import EmbedTask, EncodedText
from tests.builders_jobs import make_claimed
from tests.builders_metrics import value
from worker.engine.types import StepResult
from worker.metrics import WorkerMetrics

JOB = make_claimed("g", age_ms=2000)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry, clock: Clock) -> WorkerMetrics:
    return WorkerMetrics(registry, "tiny", 1, clock)


def tokens(*ids: int, first: int = 0, end: bool = False, generation_id: str = "g") -> NewEvent:
    delta = OutputDelta(0, first, ids, finish_reason=FinishReason.LENGTH if end else None)
    terminal = JobState.DONE if end else None
    return NewEvent(
        generation_id=generation_id, body=EventBody((delta,)), completion_tokens=first + len(ids), terminal=terminal
    )


def test_times_of_a_generation_begin_when_it_was_accepted(
    metrics: WorkerMetrics, registry: CollectorRegistry, clock: Clock
) -> None:
    metrics.claimed([JOB])
    clock.now += 0.5
    metrics.committed([tokens(7)], ())
    clock.now += 0.3
    metrics.committed([tokens(8, 9, first=1)], ())
    clock.now += 0.2
    metrics.committed([tokens(10, first=3, end=True)], ())
    sums = {
        "request_queue_time": 2.0,
        "time_to_first_token": 2.5,
        "request_prefill_time": 0.5,
        "inter_token_latency": 0.3 / 2 + 0.2,  # of an event with two tokens, per token
        "request_decode_time": 0.5,
        "e2e_request_latency": 3.0,
    }
    for name, seconds in sums.items():
        assert value(registry, f"torchrelay_{name}_seconds_sum", model_name="tiny") == pytest.approx(seconds), name
    assert value(registry, "torchrelay_inter_token_latency_seconds_count", model_name="tiny") == 2
    assert value(registry, "torchrelay_request_success_total", model_name="tiny", finished_reason="length") == 1
    assert value(registry, "torchrelay_request_prompt_tokens_sum", model_name="tiny") == 3
    assert value(registry, "torchrelay_request_generation_tokens_sum", model_name="tiny") == 4
    labels = {"model_name": "tiny", "tenant": "acme"}
    assert value(registry, "torchrelay_tenant_tokens_total", kind="prompt", **labels) == 3
    assert value(registry, "torchrelay_tenant_tokens_total", kind="generation", **labels) == 4


@pytest.mark.parametrize(
    ("num_claims", "num_preemptions", "kind"),
    [(1, 0, "first"), (2, 0, "takeover"), (2, 1, "preempted"), (3, 1, "takeover")],
)
def test_claims_by_kind(
    metrics: WorkerMetrics, registry: CollectorRegistry, num_claims: int, num_preemptions: int, kind: str
) -> None:
    metrics.claimed([structs.replace(JOB, num_claims=num_claims, num_preemptions=num_preemptions)])
    for each in ("first", "takeover", "preempted"):
        assert value(registry, "torchrelay_claims_total", model_name="tiny", kind=each) == (each == kind)


def test_who_takes_over_counts_the_end_but_no_first_token(
    metrics: WorkerMetrics, registry: CollectorRegistry, clock: Clock
) -> None:
    metrics.claimed([structs.replace(JOB, num_claims=2, age_ms=5000)])
    clock.now += 1
    metrics.committed([tokens(7, first=2)], ())
    clock.now += 1
    metrics.committed([tokens(8, first=3, end=True)], ())
    assert value(registry, "torchrelay_request_queue_time_seconds_count", model_name="tiny") == 0
    assert value(registry, "torchrelay_time_to_first_token_seconds_count", model_name="tiny") == 0
    assert value(registry, "torchrelay_e2e_request_latency_seconds_sum", model_name="tiny") == 7
    # The prompt was counted by who read it first.
    assert value(registry, "torchrelay_tenant_tokens_total", model_name="tiny", tenant="acme", kind="prompt") == 0


def test_what_turns_out_to_be_lost_is_not_counted(metrics: WorkerMetrics, registry: CollectorRegistry) -> None:
    metrics.claimed([JOB])
    metrics.committed([tokens(7, end=True)], {"g"})
    metrics.dropped("g", "TAKEN")
    metrics.dropped("g", "TAKEN")  # it is held no longer
    metrics.committed([tokens(7, end=True)], ())
    assert value(registry, "torchrelay_request_success_total", model_name="tiny", finished_reason="length") == 0
    assert value(registry, "torchrelay_jobs_dropped_total", model_name="tiny", reason="TAKEN") == 1


def test_failures_by_reason(metrics: WorkerMetrics, registry: CollectorRegistry) -> None:
    metrics.claimed([JOB])
    failed = NewEvent(
        generation_id="g",
        body=EventBody(),
        completion_tokens=0,
        terminal=JobState.FAILED,
        reason=Reason.WORKER_FAILED,
    )
    metrics.committed([failed], ())
    assert value(registry, "torchrelay_request_failure_total", model_name="tiny", reason="WORKER_FAILED") == 1
    assert value(registry, "torchrelay_e2e_request_latency_seconds_count", model_name="tiny") == 0


def test_tasks_count_their_texts_and_have_no_answer_tokens(metrics: WorkerMetrics, registry: CollectorRegistry) -> None:
    task = EmbedTask((EncodedText(bytes(4 * 5)),))
    body = JobBody(prompt_token_ids=(), sampling=SamplingParams(max_tokens=0), task=task)
    metrics.claimed([structs.replace(JOB, body=body)])
    done = NewEvent(generation_id="g", body=EventBody(), completion_tokens=0, terminal=JobState.DONE)
    metrics.committed([done], ())
    assert value(registry, "torchrelay_request_success_total", model_name="tiny", finished_reason="done") == 1
    assert value(registry, "torchrelay_tenant_tokens_total", model_name="tiny", tenant="acme", kind="prompt") == 5
    assert value(registry, "torchrelay_request_generation_tokens_count", model_name="tiny") == 0


def test_tenants_beyond_the_bound_share_one_series(metrics: WorkerMetrics, registry: CollectorRegistry) -> None:
    for tenant in ("acme", "emca", "third", "acme"):
        metrics.claimed([structs.replace(JOB, tenant=tenant)])
        metrics.committed([tokens(7, end=True)], ())
    counted = {
        sample.labels["tenant"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "torchrelay_tenant_tokens_total" and sample.labels["kind"] == "generation"
    }
    assert counted == {"acme": 2, "other": 2}


def test_recent_times_and_load_for_the_heartbeat(metrics: WorkerMetrics, clock: Clock) -> None:
    assert metrics.recent_first_tokens() == {}
    for index in range(20):
        metrics.claimed([structs.replace(JOB, generation_id=str(index), age_ms=100 * (index + 1))])
        metrics.committed([tokens(7, generation_id=str(index))], ())
    assert metrics.recent_first_tokens() == {"ttft_p50_ms": pytest.approx(1000), "ttft_p95_ms": pytest.approx(1900)}
    clock.now += 61
    assert metrics.recent_first_tokens() == {}

    metrics.busy_ratio()
    metrics.stepped(StepResult(1, (), 0.5, 64, 4))
    clock.now += 2
    assert metrics.busy_ratio() == pytest.approx(0.25)
    clock.now += 2
    assert metrics.busy_ratio() == 0


def test_a_step_without_work_is_in_no_batch(metrics: WorkerMetrics, registry: CollectorRegistry) -> None:
    metrics.stepped(StepResult(1, (), 0.001))
    metrics.stepped(StepResult(2, (), 0.002, 65, 3))
    assert value(registry, "torchrelay_step_duration_seconds_count", model_name="tiny") == 2
    assert value(registry, "torchrelay_step_batch_size_sum", model_name="tiny") == 3
    assert value(registry, "torchrelay_iteration_tokens_sum", model_name="tiny") == 65
    assert value(registry, "torchrelay_engine_busy_seconds_total", model_name="tiny") == pytest.approx(0.003)

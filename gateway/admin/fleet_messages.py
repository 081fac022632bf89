"""From what the queue tells of workers, generations and waiting jobs to the operators' messages. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from google.protobuf.duration_pb2 import Duration

from common.grants import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL
from common.jobs import GenerationRecord, JobState, LiveWorker, QueueShape
from common.registry import ModelEntry
from gateway import convert
from torchrelay.admin.v1beta1 import fleet_pb2 as pb
from torchrelay.v1 import generation_pb2, model_pb2

_PRIORITIES: Final = {
    PRIORITY_HIGH: generation_pb2.PRIORITY_HIGH,
    PRIORITY_NORMAL: generation_pb2.PRIORITY_NORMAL,
    PRIORITY_LOW: generation_pb2.PRIORITY_LOW,
}


def worker_message(entry: ModelEntry, worker: LiveWorker) -> pb.Worker:
    """A worker with the figures of its last heartbeat, as far as its version tells them."""
    message = pb.Worker(
        worker_id=worker.worker_id,
        model=entry.card.name,
        model_revision=entry.card.revision,
        num_jobs=worker.num_jobs,
        drain_requested_by=worker.drain_requested_by,
    )
    if worker.reported_ms:
        message.report_time.FromMilliseconds(worker.reported_ms)
    info = worker.info
    if info is None:
        return message
    stats = info.stats
    message.host = info.host
    message.device = info.device
    message.version = info.versions.get("torchrelay", "")
    message.num_running = info.num_running
    message.num_waiting = info.num_waiting
    message.draining = info.draining
    message.num_blocks = int(stats.get("num_blocks", 0))
    message.num_free_blocks = int(stats.get("num_free_blocks", 0))
    message.block_size = int(stats.get("block_size", 0))
    message.num_steps = int(stats.get("num_steps", 0))
    message.num_preemptions = int(stats.get("num_preemptions", 0))
    message.generated_tokens = int(stats.get("generated_tokens", 0))
    message.prompt_tokens = int(stats.get("prompt_tokens", 0))
    message.cached_prompt_tokens = int(stats.get("cached_prompt_tokens", 0))
    message.last_step_time.FromMicroseconds(int(stats.get("last_step_ms", 0) * 1000))
    message.memory_used_bytes = int(stats.get("memory_used_bytes", 0))
    message.memory_total_bytes = int(stats.get("memory_total_bytes", 0))
    if "ttft_p50_ms" in stats:
        message.time_to_first_token_p50.FromMicroseconds(int(stats["ttft_p50_ms"] * 1000))
    if "ttft_p95_ms" in stats:
        message.time_to_first_token_p95.FromMicroseconds(int(stats["ttft_p95_ms"] * 1000))
    if "busy_ratio" in stats:
        message.busy_ratio = stats["busy_ratio"]
    return message


def generation_message(entry: ModelEntry, record: GenerationRecord) -> pb.GenerationInfo:
    info = pb.GenerationInfo(
        generation_id=record.generation_id,
        model=entry.card.name,
        tenant=record.tenant,
        state=convert.state_of(record),
        worker_id=record.worker_id,
        create_time=convert.timestamp(record.created_ms),
        usage=convert.usage_message(record.usage),
        num_claims=record.num_claims,
    )
    if record.state is JobState.QUEUED:
        info.place = max(0, record.place - 1)
    return info


def model_message(entry: ModelEntry, workers: Sequence[LiveWorker], shape: QueueShape) -> pb.FleetModel:
    """A model revision with what waits for it."""
    alive = sum(worker.lease_left_ms > 0 for worker in workers)
    return pb.FleetModel(
        model=entry.card.name,
        model_revision=entry.card.revision,
        state=model_pb2.MODEL_STATE_READY if alive else model_pb2.MODEL_STATE_COLD,
        num_workers=alive,
        num_running=shape.num_running,
        classes=[
            pb.WaitingClass(
                priority=_PRIORITIES[one.priority],
                num_waiting=one.num_waiting,
                oldest_wait=_duration(one.oldest_ms),
                expected_wait=_duration(one.expected_wait_ms),
            )
            for one in shape.classes
        ],
        tenants=[
            pb.WaitingTenant(
                priority=_PRIORITIES[one.priority],
                tenant=one.tenant,
                num_waiting=one.num_waiting,
                oldest_wait=_duration(one.oldest_ms),
            )
            for one in sorted(shape.tenants, key=lambda one: (one.priority, -one.oldest_ms, one.tenant))
        ],
        has_more_tenants=shape.has_more_tenants,
        num_dead_letters=shape.num_dead_letters,
    )


def _duration(milliseconds: int | None) -> Duration | None:
    if milliseconds is None:
        return None
    message = Duration()
    message.FromMilliseconds(milliseconds)
    return message

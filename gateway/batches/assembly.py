"""Puts the parts of batches together as the settings say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from common.batches import Batches
from common.job_queue import JobQueue
from common.settings import QueueSettings
from gateway.admission import Admission
from gateway.batches.creation import Maker
from gateway.batches.feeder import FeedParts, FeedSettings
from gateway.batches.feeders import Feeders
from gateway.batches.jobs import GenerationJobs, JobRunner, TaskJobs
from gateway.batches.running import Bells, Forgetting, Owners, Runner
from gateway.batches.servicer import BatchServicer
from gateway.catalog import Catalog
from gateway.generations import Generations
from gateway.secret import SharedSecret
from gateway.settings import GatewaySettings
from gateway.stream import StreamFactory
from gateway.tasks.core import Tasks

_TASKS: Final = ("embed", "classify", "classify_tokens", "answer_question", "rerank")
_MAX_RENEW_S: Final = 1.0  # so that a feeder soon hears of what others do to its batch


@dataclass(frozen=True, slots=True)
class Batching:
    """What serves batches, and what feeds them."""

    servicer: BatchServicer
    feeders: Feeders


def build_batching(
    batches: Batches,
    queue: JobQueue,
    admission: Admission,
    streams: StreamFactory,
    catalog: Catalog,
    generations: Generations,
    tasks: Tasks,
    owners: Owners,
    secret: SharedSecret,
    settings: GatewaySettings,
    queue_settings: QueueSettings,
) -> Batching:
    """Return the parts; `feeders` is to be run."""
    of_generations, of_tasks = GenerationJobs(generations), TaskJobs(tasks, queue)
    parts = (queue, admission, streams, catalog)
    runners: dict[str, Runner] = dict.fromkeys(_TASKS, JobRunner(*parts, of_tasks.prepare, of_tasks.read))
    runners["generate"] = JobRunner(*parts, of_generations.prepare, of_generations.read)
    bells = Bells()
    lease_ms = queue_settings.gateway_lease_ms
    feeders = Feeders(
        FeedParts(batches, queue, runners, owners, Forgetting(queue), bells),
        FeedSettings(
            window=settings.batch_window,
            lease_ms=lease_ms,
            renew_s=min(_MAX_RENEW_S, lease_ms / 4000),
            reveal_models=settings.reveal_models,
        ),
        max_batches=settings.max_fed_batches,
        interval_s=min(settings.maintenance_interval_s, queue_settings.max_upkeep_pause_s),
    )
    maker = Maker(batches, settings, secret, frozenset(runners))
    servicer = BatchServicer(batches, maker, feeders, bells, generations, progress_s=settings.progress_interval_s)
    return Batching(servicer, feeders)

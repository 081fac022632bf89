"""Puts the parts of batches together as the settings say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from common.batches import Batches
from common.job_queue import JobQueue
from common.settings import QueueSettings
from gateway.batches.creation import Maker
from gateway.batches.feeder import FeedParts, FeedSettings
from gateway.batches.feeders import Feeders
from gateway.batches.running import Bells, Forgetting, GenerationRunner, Owners, Runner
from gateway.batches.servicer import BatchServicer
from gateway.generations import Generations
from gateway.secret import SharedSecret
from gateway.settings import GatewaySettings

_MAX_RENEW_S: Final = 1.0  # so that a feeder soon hears of what others do to its batch


@dataclass(frozen=True, slots=True)
class Batching:
    """What serves batches, and what feeds them."""

    servicer: BatchServicer
    feeders: Feeders


def build_batching(
    batches: Batches,
    queue: JobQueue,
    generations: Generations,
    owners: Owners,
    secret: SharedSecret,
    settings: GatewaySettings,
    queue_settings: QueueSettings,
) -> Batching:
    """Return the parts; `feeders` is to be run."""
    runners: dict[str, Runner] = {"generate": GenerationRunner(generations)}
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

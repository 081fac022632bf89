"""All settings of one worker process, for itself, `torchrelay config` and `torchrelay doctor`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, Self

from common.configuration import Program
from common.sealing import EncryptionSettings, Sealer
from common.settings import MetricsSettings, QueueSettings, RedisSettings
from common.telemetry.tracing import Tracing, TracingSettings, make_tracing
from worker.engine.settings import EngineSettings
from worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class WorkerConfiguration:
    """What the environment says, and what is made of it at once, so that faults in it end the start."""

    worker: WorkerSettings
    engine: EngineSettings
    redis: RedisSettings
    queue: QueueSettings
    metrics: MetricsSettings
    sealer: Sealer
    tracing: Tracing | None  # None: no spans

    @classmethod
    def read(cls) -> Self:
        """Raises ValidationError and ValueError for settings that are wrong or do not agree."""
        return cls(
            WorkerSettings(),
            EngineSettings(),
            RedisSettings(),
            QueueSettings(),
            MetricsSettings(),
            Sealer.from_settings(EncryptionSettings()),
            make_tracing(TracingSettings(), "worker", {"service.version": version("torchrelay")}),
        )


PROGRAM: Final = Program("worker", (WorkerSettings, EngineSettings))

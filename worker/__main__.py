"""One worker process, from the environment's settings."""

from __future__ import annotations

import sys

from common.sealing import EncryptionSettings, Sealer
from common.settings import MetricsSettings, QueueSettings, RedisSettings
from common.startup import read_settings
from worker.engine.device import leave_out_triton, quiet_openmp
from worker.engine.settings import EngineSettings
from worker.settings import WorkerSettings


def main() -> int:
    """Run a worker; return the exit status."""
    settings = read_settings(
        lambda: (
            WorkerSettings(),
            EngineSettings(),
            RedisSettings(),
            QueueSettings(),
            Sealer.from_settings(EncryptionSettings()),
            MetricsSettings(),
        ),
        WorkerSettings,
        EngineSettings,
    )
    quiet_openmp()
    leave_out_triton(settings[0].device)
    from worker.process import run_process  # imports torch, and so comes last

    return run_process(*settings)


if __name__ == "__main__":
    sys.exit(main())

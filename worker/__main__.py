"""One worker process, from the environment's settings."""

from __future__ import annotations

import sys

from common.startup import read_settings
from worker.configuration import WorkerConfiguration
from worker.engine.device import leave_out_triton, quiet_openmp
from worker.engine.settings import EngineSettings
from worker.settings import WorkerSettings


def main() -> int:
    """Run a worker; return the exit status."""
    configuration = read_settings(WorkerConfiguration.read, WorkerSettings, EngineSettings)
    quiet_openmp()
    leave_out_triton(configuration.worker.device)
    from worker.process import run_process  # imports torch, and so comes last

    return run_process(configuration)


if __name__ == "__main__":
    sys.exit(main())

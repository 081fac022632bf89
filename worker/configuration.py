"""The worker's settings, for `torchrelay config` and `torchrelay doctor`. Imports no torch."""

from __future__ import annotations

from typing import Final

from common.configuration import Program
from worker.engine.settings import EngineSettings
from worker.settings import WorkerSettings

PROGRAM: Final = Program("worker", (WorkerSettings, EngineSettings))

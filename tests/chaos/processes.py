"""Gateways and workers as processes that can be killed, stopped and started again within moments."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from tests.zygote import Zygote


@dataclass
class Party:
    """A gateway or worker: started, killed and started again under one name, each time as a new incarnation."""

    name: str
    module: str
    zygote: Zygote
    env: dict[str, str]
    log_path: Path
    patches: tuple[str, ...] = ()
    address: str = ""  # of a gateway
    admin_address: str = ""
    pid: int | None = None
    wanted: bool = True  # whoever tends the system starts it again when it has ended
    num_starts: int = 0
    log_offset: int = 0  # where its present life begins in its log

    def start(self) -> None:
        """Start it; it must not be running."""
        assert not self.is_running
        self.log_offset = self.log_path.stat().st_size if self.log_path.exists() else 0
        self.pid = self.zygote.start(self.module, self.env, self.log_path, self.patches)
        self.num_starts += 1

    @property
    def is_running(self) -> bool:
        return self.pid is not None and self.zygote.status(self.pid) is None

    def signal(self, number: int) -> bool:
        """Send a signal; return whether there was anything to send it to."""
        if not self.is_running or self.pid is None:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """As kill -9 does."""
        if self.signal(signal.SIGKILL):
            self.wait(10)

    def wait(self, timeout_s: float) -> int:
        """Wait for the end; return the exit status. Raises TimeoutError."""
        assert self.pid is not None
        return self.zygote.wait(self.pid, timeout_s)

    def log(self) -> str:
        """Return what its present life has logged."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as file:
            file.seek(self.log_offset)
            return file.read().decode(errors="replace")

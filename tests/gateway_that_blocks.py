"""A gateway whose event loop can be blocked, as by a call that does not return: SIGUSR1 has it sleep for BLOCK_S."""

from __future__ import annotations

import signal
import sys
import time
from typing import Final

from gateway.__main__ import main

BLOCK_S: Final = 3.0

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(BLOCK_S))
    sys.exit(main())

"""Ports for servers that tests start: below those of outgoing connections, any of which could take a port between its
choice and its use.
"""

from __future__ import annotations

import os
import random
import socket
from typing import Final

FIRST: Final = 12_000
END: Final = 32_000  # Linux gives outgoing connections 32,768 and more

_rng = random.Random(os.urandom(8))  # test processes run side by side
_given: set[int] = set()


def free_port(*, also: int = 0) -> int:
    """Return a port on which nobody listens, and none twice. `also` is how far above it another one must be free."""
    while True:
        port = _rng.randrange(FIRST, END)
        if port not in _given and _is_free(port) and (not also or _is_free(port + also)):
            _given.add(port)
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

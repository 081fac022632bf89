"""A gateway that never looks at its certificates again: the mutant that the test of renewal must see."""

from __future__ import annotations

import sys

from gateway.__main__ import main
from gateway.tls import ServerCertificates

if __name__ == "__main__":
    ServerCertificates.reload = lambda self: self._current  # type: ignore[method-assign]
    sys.exit(main())

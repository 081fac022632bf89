"""How this Python was built.

Run as a file it says whether the Python that runs it will do for an installation: so make chooses among several.
"""

from __future__ import annotations

import sys
import sysconfig

_OLDEST = (3, 11)
_DISTRIBUTION = "/usr"  # where Linux distributions install theirs; Debian's profiles without naming the option


def is_profiled() -> bool:
    """Whether the interpreter was compiled with a profile of itself, as distributions, images and python.org do it.

    One that was not, as pyenv builds it unless told otherwise, is slower by a fifth. True where its build says nothing.
    """
    options = sysconfig.get_config_var("CONFIG_ARGS")
    return not options or "--enable-optimizations" in options or sys.base_prefix == _DISTRIBUTION


def main() -> int:
    """Print a rank, the lowest being the best, and this program's path. Fail where no environment can be made of it."""
    if sys.version_info < _OLDEST:
        return 1
    try:
        import ensurepip  # noqa: F401 - venv is there without it on Debian, and makes nothing
        import venv  # noqa: F401
    except ImportError:
        return 1
    sys.stdout.write(f"{int(not is_profiled())} {sys.executable}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

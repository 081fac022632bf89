"""Children end with their parent, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from common.children import die_with_parent

PARENT = """
import subprocess, sys, time
from common.children import die_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=die_with_parent())
print(child.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    """Whether a process is there and is not just waiting to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_child_ends_when_its_parent_is_killed() -> None:
    if not sys.platform.startswith("linux"):  # nothing else tells a child of its parent's death
        assert die_with_parent() is None
        return
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    until = time.monotonic() + 10
    try:
        while is_running(child):
            assert time.monotonic() < until, "the child outlived its parent"
            time.sleep(0.01)
    finally:
        if is_running(child):
            os.kill(child, signal.SIGKILL)

"""`make fuzz`: each target in its own process over its kept corpus; a crash is kept in build/fuzz and fails the run."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import IO, Final, NamedTuple

from tests.security.fuzz import seeds
from tests.security.fuzz.targets import TARGETS

CORPUS: Final = Path(__file__).parents[1] / "corpus"
BUILD: Final = Path("build/fuzz")
MAX_INPUT_BYTES: Final = 4096
_KEPT_BYTES: Final = 512  # an input that is longer is not worth its room in the repository
_GRACE_S: Final = 120
_EXECUTIONS: Final = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


class Run(NamedTuple):
    """A fuzzer at work."""

    target: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]


def command(python: str, target: str, *arguments: str) -> list[str]:
    return [python, "-m", "tests.security.fuzz.harness", target, *arguments]


def environment() -> dict[str, str]:
    """The fuzzer has an environment of its own; what it tests is found in this one."""
    paths = [os.getcwd(), f"{os.getcwd()}/protos", sysconfig.get_path("purelib")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def start(python: str, target: str, duration_s: int) -> Run:
    """Begin to fuzz a target over its kept corpus and good inputs; what is new goes to build/fuzz."""
    new, good = BUILD / target / "new", BUILD / target / "good"
    for folder in (new, good):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds.of(target)):
        (good / f"{number:03}").write_bytes(data)
    log = (BUILD / f"{target}.log").open("wb+")
    arguments = (
        f"-max_total_time={duration_s}",
        f"-max_len={MAX_INPUT_BYTES}",
        "-timeout=10",  # of one input, in seconds
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        f"-artifact_prefix={BUILD / target}/",
        str(new),
        str(good),
        str(CORPUS / target),
    )
    process = subprocess.Popen(command(python, target, *arguments), stdout=log, stderr=log, env=environment())
    return Run(target, process, log)


def finish(run: Run, timeout_s: float) -> dict[str, object]:
    """Wait for a fuzzer and return what it did."""
    try:
        status = run.process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        run.process.kill()
        status = run.process.wait()
    run.log.seek(0)
    output = run.log.read().decode(errors="replace")
    run.log.close()
    crashes = sorted(
        str(path) for kind in ("crash", "timeout", "oom", "leak") for path in (BUILD / run.target).glob(f"{kind}-*")
    )
    found = _EXECUTIONS.findall(output)
    if status:
        sys.stderr.write(f"--- {run.target} ended with {status} ---\n{output[-4000:]}\n")
    return {
        "target": run.target,
        "executions": int(found[-1]) if found else 0,
        "crashes": len(crashes) or int(status != 0),
        "files": crashes,
        "new_inputs": len(list((BUILD / run.target / "new").iterdir())),
    }


def keep(target: str) -> None:
    """Add what reached new code to the kept corpus; the fuzzer has shortened it already."""
    for path in sorted((BUILD / target / "new").iterdir()):
        if path.stat().st_size <= _KEPT_BYTES:
            (CORPUS / target / path.name).write_bytes(path.read_bytes())


def main() -> int:
    """Fuzz, print one line for each target and one for all; return the exit status."""
    arguments = argparse.ArgumentParser(prog="make fuzz")
    arguments.add_argument("--python", required=True, help="an interpreter that has atheris")
    arguments.add_argument("--duration", type=int, default=600, help="seconds, of each target")
    arguments.add_argument("--targets", default=",".join(TARGETS))
    arguments.add_argument("--keep", action="store_true", help="add what was new and is short to the kept corpus")
    given = arguments.parse_args()
    targets = given.targets.split(",")
    for target in targets:  # of an earlier run
        for path in (BUILD / target).glob("*-*"):
            path.unlink()
    runs = [start(given.python, target, given.duration) for target in targets]
    results = [finish(run, given.duration + _GRACE_S) for run in runs]
    for result in results:
        sys.stdout.write(json.dumps(result) + "\n")
    if given.keep:
        for target in targets:
            keep(target)
    crashes = sum(int(str(result["crashes"])) for result in results)
    idle = [result["target"] for result in results if not result["executions"]]
    total = {
        "target": "fuzz",
        "duration_s": given.duration,
        "executions": sum(int(str(result["executions"])) for result in results),
        "crashes": crashes,
        "without_executions": idle,
        "corpus_bytes": sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()),
    }
    sys.stdout.write(json.dumps(total) + "\n")
    return 1 if crashes or idle else 0


if __name__ == "__main__":
    sys.exit(main())

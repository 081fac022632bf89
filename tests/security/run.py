"""`make security`: runs every test of the sixty bad inputs and each flood in earnest, and writes the table.

The table is README.md beside this file. The last line is one JSON object; the exit status says whether all holds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from tests.builders_models import write_tiny_model
from tests.builders_system import running_system
from tests.security.attacks import ATTACKS
from tests.security.flood import Damage, suffer
from tests.security.rows import ROWS
from tests.security.test_rows import marked_rows
from tests.security.timing import Leak, measure_leaks

README: Final = Path(__file__).parent / "README.md"
_MOST_MB: Final = 200
_LEAST_AUC, _MOST_AUC = 0.45, 0.55


@dataclass(frozen=True, slots=True)
class Shown:
    """What a row's tests did."""

    tests: tuple[str, ...]
    passed: int
    failed: int

    @property
    def word(self) -> str:
        return "holds" if self.passed and not self.failed else "FAILS"


def run_tests(report: Path) -> dict[int, Shown]:
    """Run the tests that rows name, and count by row."""
    by_test: dict[str, list[int]] = defaultdict(list)
    for number, test in marked_rows():
        by_test[test].append(number)
    command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", "-o", "junit_family=xunit1", *by_test]
    subprocess.run(command, check=False)
    results: dict[str, list[bool]] = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        name = (case.get("name") or "").partition("[")[0]
        test = f"{case.get('file')}::{name}"
        results[test].append(
            case.find("failure") is None and case.find("error") is None and case.find("skipped") is None
        )
    shown = {}
    for row in ROWS:
        tests = tuple(test for test, numbers in by_test.items() if row.number in numbers)
        outcomes = [passed for test in tests for passed in results.get(test, [False])]
        shown[row.number] = Shown(tests, sum(outcomes), len(outcomes) - sum(outcomes))
    return shown


def flood(num_frames: int) -> list[Damage]:
    """Every attack in earnest, one after another, on one gateway that is never restarted."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        model = write_tiny_model(home / "model")
        (home / "system").mkdir()
        with running_system(home / "system") as system:
            system.add_gateway()
            system.add_worker(model, "tiny")
            asyncio.run(system.ready("tiny"))
            return [asyncio.run(suffer(system, name, num_frames)) for name in ATTACKS]


def write_table(shown: dict[int, Shown], damages: Iterable[Damage], leaks: Iterable[Leak]) -> None:
    """Write README.md."""
    lines = [
        "# Bad inputs, floods and timing",
        "",
        "Written by `make security`; a test holds the first table to `rows.py`.",
        "",
        "## Bad inputs",
        "",
        "Each is sent over a real socket; the answer is checked, and that the next good call is served.",
        "",
        "| # | sent | status | reason | tests | |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        found = shown[row.number]
        names = "<br>".join(f"`{test.rpartition('::')[2]}`" for test in found.tests)
        lines.append(f"| {row.number} | {row.sent} | {row.status} | {row.reason} | {names} | {found.word} |")
    lines += [
        "",
        "## Floods on one connection",
        "",
        "Of 100,000 frames each, how much the gateway took before it hung up; what is one malformed thing goes once. "
        "A good client calls on another connection all the while, about every 50 ms. Memory is what the gateway keeps.",
        "",
        "| attack | sent kB | seconds | gateway CPU s | memory MB | good calls | failed | p50 ms | longest ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {d.attack} | {d.sent_kb:,} | {d.seconds} | {d.gateway_cpu_s} | {d.rss_growth_mb:+} | {d.probes} | "
        f"{d.failed_probes} | {d.probe_p50_ms} | {d.probe_max_ms} |"
        for d in damages
    ]
    lines += [
        "",
        "## Timing: a foreign generation against one that does not exist",
        "",
        "Interleaved calls; the area under the ROC curve of a guess by time alone. 0.5 is no better than a coin.",
        "",
        "| call | calls each | median foreign ms | median absent ms | AUC |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {leak.call} | {leak.calls:,} | {leak.foreign_ms:.3f} | {leak.absent_ms:.3f} | {leak.auc:.3f} |"
        for leak in leaks
    ]
    README.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=100_000, help="of each flood, at most")
    parser.add_argument("--calls", type=int, default=2000, help="of each kind, for the timing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shown = run_tests(Path(folder) / "report.xml")
    leaks = asyncio.run(measure_leaks(arguments.calls))
    damages = flood(arguments.frames)
    write_table(shown, damages, leaks)
    failing = [number for number, found in shown.items() if found.word != "holds"]
    hurt = [d.attack for d in damages if d.failed_probes or not d.serves_afterwards or d.rss_growth_mb > _MOST_MB]
    told = [leak.call for leak in leaks if not _LEAST_AUC <= leak.auc <= _MOST_AUC]
    result = {
        "rows": len(shown),
        "rows_failing": failing,
        "floods": [damage.as_dict() for damage in damages],
        "floods_failing": hurt,
        "timing": [leak.as_dict() for leak in leaks],
        "timing_failing": told,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 1 if failing or hurt or told else 0


if __name__ == "__main__":
    sys.exit(main())

"""`make chaos-mutants`: breaks the programs in one place after another; the checker must see each. Last line: JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.chaos.mutants import MUTANTS, Mutant
from tests.chaos.run import Plan, run
from tests.chaos.system import Size

_SEEDS: Final = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant: the laws that it was seen to break, none if it was not caught."""

    mutant: Mutant
    laws: tuple[str, ...]
    seed: int
    seconds: float


def judge(mutant: Mutant, cache: Path) -> Verdict:
    """Run a mutant until it is caught, at most once per seed."""
    began = time.monotonic()
    for seed in _SEEDS:
        plan = Plan(
            seed=seed,
            duration_s=15,
            interval_s=mutant.interval_s,
            num_callers=16,
            num_prompts=8,
            size=Size(gateways=2, workers=2),
            kinds=mutant.kinds,
            patches=(mutant.patch,),
            give_up_s=15,
            settle_s=15,
            is_durable=mutant.patch != "nothing_on_disk",
        )
        folder = Path(tempfile.mkdtemp(prefix="torchrelay-mutant-"))
        try:
            result = asyncio.run(run(plan, folder, cache))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if result.report.num_violations:
            break
    return Verdict(mutant, tuple(sorted(result.report.violations)), seed, time.monotonic() - began)


def main(arguments: Sequence[str]) -> int:
    """Judge all or some; return 1 if one went unseen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help="of mutants; default: all")
    chosen = parser.parse_args(arguments).names
    cache = Path("build") / "chaos-truth-8.json"
    cache.parent.mkdir(exist_ok=True)
    verdicts = []
    for mutant in MUTANTS:
        if chosen and mutant.patch not in chosen:
            continue
        verdict = judge(mutant, cache)
        verdicts.append(verdict)
        found = ", ".join(verdict.laws) or "NOT CAUGHT"
        sys.stdout.write(f"| {mutant.patch} | {mutant.says} | {found} | {verdict.seconds:.0f} |\n")
        sys.stdout.flush()
    missed = [verdict.mutant.patch for verdict in verdicts if not verdict.laws]
    figures = {
        "target": "chaos-mutants",
        "mutants": len(verdicts),
        "caught": len(verdicts) - len(missed),
        "missed": missed,
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

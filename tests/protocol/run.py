"""`make protocol`: the long explorations, all mutants, and many operations of the stateful test.

Prints a line for each part and, as its last line, one JSON object. Exits with 1 when a law is broken, an exploration
met its limit, or a mutant was not found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, Final

from tests.protocol.configurations import LONG, QUICK, explore
from tests.protocol.explorer import Explored
from tests.protocol.model import Protocol
from tests.protocol.mutants import MUTANTS
from tests.protocol.stateful import run_operations

# The largest configuration has about half as many. A state takes about 0.7 KB, so a process stays below a gigabyte.
MAX_STATES: Final = 1_000_000
_PROCESSES: Final = 2


def tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def explore_one(kind: str, name: str) -> Explored:
    """One configuration, in a process of its own."""
    return explore(Protocol({"quick": QUICK, "long": LONG}[kind][name]), max_states=MAX_STATES)


def explore_mutant(number: int) -> Explored:
    mutant = MUTANTS[number]
    return explore(mutant.make(mutant.config), max_states=MAX_STATES)


def explore_all() -> tuple[dict[str, Any], dict[str, bool]]:
    """What was found of each configuration, and whether each mutant was."""
    found: dict[str, Any] = {}
    caught: dict[str, bool] = {}
    names = [("long", name) for name in LONG] + [("quick", name) for name in QUICK]
    with ProcessPoolExecutor(_PROCESSES, max_tasks_per_child=1) as pool:
        runs = {pool.submit(explore_one, *name): name for name in names}
        for run in as_completed(runs):
            result, name = run.result(), " - ".join(runs[run])
            found[name] = {
                "states": result.num_states,
                "steps": result.num_steps,
                "depth": result.depth,
                "seconds": round(result.seconds, 1),
                "complete": result.is_complete,
                "violation": None if result.violation is None else str(result.violation),
            }
            tell(f"{name}: {result.num_states} states, {result.num_steps} steps, {result.seconds:.1f} s")
            if result.violation is not None:
                tell(str(result.violation))
    with ProcessPoolExecutor(_PROCESSES) as pool:
        for mutant, result in zip(MUTANTS, pool.map(explore_mutant, range(len(MUTANTS))), strict=True):
            violation = result.violation
            name = mutant.make.__name__
            caught[name] = violation is not None and violation.property == mutant.law
            tell(f"mutant {name}: {'not found' if violation is None else violation}")
    return found, caught


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=20_000, help="of the stateful test")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000_000, help="of its histories")
    options = parser.parse_args()
    started = time.monotonic()
    found, caught = explore_all()
    stateful = run_operations(options.operations, options.seed)
    tell(f"stateful test: {stateful.operations} operations in {stateful.histories} histories, seed {options.seed}")
    if stateful.violation is not None:
        tell(stateful.violation)
    violations = sum(one["violation"] is not None for one in found.values()) + (stateful.violation is not None)
    is_complete = all(one["complete"] for one in found.values())
    report = {
        "violations": violations,
        "states": sum(one["states"] for one in found.values()),
        "steps": sum(one["steps"] for one in found.values()),
        "complete": is_complete,
        "mutants": len(caught),
        "mutants_caught": sum(caught.values()),
        "stateful_operations": stateful.operations,
        "stateful_histories": stateful.histories,
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 1),
        "configurations": found,
    }
    tell(json.dumps(report))
    return 0 if is_complete and not violations and all(caught.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

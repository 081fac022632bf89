"""`make protocol`: the long explorations, all mutants, and many operations of the stateful test.

Prints a line for each part and, as its last line, one JSON object. Exits with 1 when a law is broken, an exploration
met its limit, or a mutant was not found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, Final

from tests.protocol.configurations import LONG, QUICK, explore
from tests.protocol.explorer import Explored
from tests.protocol.model import Protocol
from tests.protocol.mutants import MUTANTS

if TYPE_CHECKING:
    from tests.protocol.stateful import Tally

# The largest configuration has about half as many. A state takes about 0.9 KB, so a process stays below a gigabyte.
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


def run_stateful(number: int, seed: int) -> Tally:
    from tests.protocol.stateful import run_operations  # only this process needs Redis and hypothesis

    return run_operations(number, seed)


def explore_all(pool: Executor) -> dict[str, Any]:
    """What was found in each configuration."""
    names = [("long", name) for name in LONG] + [("quick", name) for name in QUICK]
    runs = {pool.submit(explore_one, *name): " - ".join(name) for name in names}
    found = {}
    for run in as_completed(runs):
        result, name = run.result(), runs[run]
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
    return found


def find_mutants(pool: Executor) -> dict[str, bool]:
    """Whether each mutant broke the law that it is to break."""
    caught = {}
    for mutant, result in zip(MUTANTS, pool.map(explore_mutant, range(len(MUTANTS))), strict=True):
        violation = result.violation
        caught[mutant.make.__name__] = violation is not None and violation.property == mutant.law
        tell(f"mutant {mutant.make.__name__}: {'not found' if violation is None else violation}")
    return caught


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=20_000, help="of the stateful test")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000_000, help="of its histories")
    options = parser.parse_args()
    started = time.monotonic()
    with ProcessPoolExecutor(_PROCESSES, max_tasks_per_child=1) as pool:  # each gives its memory back at its end
        histories = pool.submit(run_stateful, options.operations, options.seed)
        found = explore_all(pool)
        stateful = histories.result()
    with ProcessPoolExecutor(_PROCESSES) as pool:
        caught = find_mutants(pool)
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

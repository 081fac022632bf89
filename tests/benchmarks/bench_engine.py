"""`make bench-engine`: our engine in process, W1 to W4, against what the machine allows, and where a step's time goes.

Prints tables and, as its last line, one JSON object. With --plots it also runs W1 at several widths, and draws.
"""

from __future__ import annotations

import sys

from tests.benchmarks import report
from tests.benchmarks.bench import PRECISIONS, Bench, make_parser, print_report, print_tables, show_plots
from tests.benchmarks.step_split import split_table
from tests.benchmarks.turns import ContestantFailed, note

_WIDTHS = (1, 2, 4, 8, 16, 32)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--precisions", default="bf16,fp32,int8", help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--no-drift", action="store_true", help="do not compare with transformers in fp32")
    parser.add_argument("--plots", action="store_true", help="also measure W1 at several widths, and draw")
    args = parser.parse_args()
    bench = Bench(args)
    entries = [bench.our_entry(precision) for precision in args.precisions.split(",")]
    with bench.measurement() as measurement:
        reference = None
        if "W1" in bench.names and not args.no_drift:
            try:
                reference = bench.reference(measurement)
            except ContestantFailed as error:
                note(str(error))
        hardware = bench.hardware(measurement)
        results, splits = measurement.results, {}
        with measurement.until_cut():
            for entry in entries:
                measurement.start(entry)
            measurement.run(bench.names)
            splits = {entry.label: bench.split(measurement, entry.precision) for entry in entries}
            if args.plots:
                measurement.sweep(_WIDTHS)
    found = bench.summaries(entries, results, reference)
    limits = bench.limits(hardware)
    shares = report.fractions(found, limits)
    split_tables = [f"{label}\n\n{split_table(rows)}" for label, rows in splits.items()]
    print_tables(report.table(found, limits), report.fraction_table(shares), *split_tables)
    if args.plots:
        show_plots(bench.folder, results, splits, found)
    more = {
        "workload": bench.workload.sha256,
        "hardware": hardware,
        "limits": limits,
        "fractions": shares,
        "split_ms": splits,
        "sweeps": results.sweeps,
    }
    print_report("bench-engine", found, results, more)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""`make bench-engine`: our engine in process, W1 to W4, against what the machine allows.

Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import sys

from tests.benchmarks import report
from tests.benchmarks.bench import PRECISIONS, Bench, make_parser, print_report, print_tables
from tests.benchmarks.turns import ContestantFailed, note


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--precisions", default="bf16,fp32", help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--no-drift", action="store_true", help="do not compare with transformers in fp32")
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
        for entry in entries:
            measurement.start(entry)
        measurement.run(bench.names)
        results = measurement.results
    found = bench.summaries(entries, results, reference)
    limits = bench.limits(hardware)
    shares = report.fractions(found, limits)
    print_tables(report.table(found, limits), report.fraction_table(shares))
    more = {"workload": bench.workload.sha256, "hardware": hardware, "limits": limits, "fractions": shares}
    print_report("bench-engine", found, results, more)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())

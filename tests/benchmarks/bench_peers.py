"""`make bench-peers`: our engine and others on this machine, in turns.

vLLM (CPU build), OpenVINO GenAI, llama.cpp and transformers are installed into environments of their own, load the
same weights, and run W1 to W4 in turns with ours: each in every round, the rest of them stopped meanwhile. Prints
tables and, as its last line, one JSON object whose `ratios` (by workload, precision and peer) are above 1 where ours is
better. W2 and W3, of seconds each, run six rounds; `--rounds` counts those of W1 and W4.

    --quick    one round; slow engines run part of W1, and no W4 where they do not share prefixes
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.benchmarks import report
from tests.benchmarks.bench import PRECISIONS, Bench, make_parser, print_report, print_tables, show_plots
from tests.benchmarks.install_peers import InstallError, Peers, demo_gguf
from tests.benchmarks.step_split import split_table
from tests.benchmarks.turns import ContestantFailed, Entry, note
from tests.benchmarks.workload import NUM_VARIANTS

# Seconds each, and other guests of the host are seen in single ones: all texts of these take part.
_SHORT: Final = ("W2", "W3")
# One run of a slow engine tells enough: it is several times behind, and the rounds of the fast ones wait for it.
_PART: Final = {"W1": 16}


def entries_of(name: str, peers: Peers, bench: Bench, gguf: Path | None, *, quick: bool) -> Iterator[Entry]:
    """Prepare a peer's models and yield what takes part, with no rounds of what it would take minutes for.

    Raises InstallError.
    """
    model = str(bench.model)
    if name == "vllm":
        env = {"VLLM_CACHE_ROOT": str(peers.folder / "vllm-cache")}
        yield Entry(
            name="vllm",
            precision="bf16",
            module="tests.benchmarks.contestants.vllm_cpu",
            model=model,
            python=peers.python("vllm"),
            env=env,
        )
    elif name == "openvino":
        # Prompts that arrive together do not share their prefix there: W4 computes it 32 times, half a minute a run.
        rounds = {"W4": 0 if quick else 1}
        for precision, weights in (("bf16", "fp16"), ("int8", "int8")):
            exported = str(peers.openvino_model(bench.model, weights))
            python = peers.python("openvino")
            yield Entry(
                name="openvino",
                precision=precision,
                module="tests.benchmarks.contestants.openvino_genai",
                model=exported,
                python=python,
                rounds=rounds,
            )
    elif name == "llamacpp":
        if gguf is None:
            raise InstallError("llama.cpp needs the model as a GGUF file: name it with --gguf")
        # No prefix is shared there either, and each of W4's requests takes seconds: a quarter of them shows the rate.
        part = {"W4": 8, **(_PART if quick else {})}
        for precision, kind in (("bf16", "BF16"), ("int8", "Q8_0")):
            yield Entry(
                name="llamacpp",
                precision=precision,
                module="tests.benchmarks.contestants.llamacpp_server",
                model=str(peers.gguf_model(gguf, kind)),
                arguments=("--bin", str(peers.llama_bin)),
                rounds={"W1": 1, "W4": 0 if quick else 1},
                num_requests=part,
            )
    else:
        python = peers.python("transformers")
        yield Entry(
            name="transformers-batching",
            precision="bf16",
            module="tests.benchmarks.contestants.transformers_batching",
            model=model,
            python=python,
            rounds={"W1": 1, "W4": 0},
            num_requests=_PART,
        )
        yield Entry(
            name="transformers-generate",
            precision="bf16",
            module="tests.benchmarks.contestants.transformers_generate",
            model=model,
            python=python,
            arguments=("--width", str(_PART["W1"])),
            rounds={"W1": 0 if quick else 1, "W4": 0},
            num_requests=_PART,
        )


def gather(
    names: list[str], peers: Peers, bench: Bench, gguf: Path | None, failures: dict[str, str], *, quick: bool
) -> list[Entry]:
    """Install the peers and return their entries; who cannot be installed is noted with the reason."""
    entries: list[Entry] = []
    for name in names:
        try:
            peers.install(name)
            entries += entries_of(name, peers, bench, gguf, quick=quick)
        except InstallError as error:
            note(f"{name}: {error}")
            failures[name] = str(error)
    return entries


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder for environments and models")
    parser.add_argument("--engines", default="vllm,openvino,llamacpp,transformers", help="peers to compare with")
    parser.add_argument("--precisions", default="bf16,int8", help=f"ours, of {', '.join(PRECISIONS)}")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp (default: the demo model's)")
    parser.add_argument("--plots", action="store_true", help="draw memory and the parts of a step")
    parser.add_argument("--quick", action="store_true", help="one round")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
    bench = Bench(args)
    peers = Peers(args.peers)
    gguf = args.gguf or (demo_gguf() if args.model == "demo" else None)
    with bench.measurement() as measurement:
        failures = measurement.results.failures
        ours = [bench.our_entry(precision) for precision in args.precisions.split(",")]
        entries = ours + gather(args.engines.split(","), peers, bench, gguf, failures, quick=args.quick)
        if not args.quick:
            more_rounds = dict.fromkeys(_SHORT, NUM_VARIANTS)
            entries = [dataclasses.replace(entry, rounds={**more_rounds, **entry.rounds}) for entry in entries]
        reference = None
        try:
            reference = bench.reference(measurement) if "W1" in bench.names else None
        except ContestantFailed as error:
            failures["reference"] = str(error)
        hardware = bench.hardware(measurement)
        results, splits = measurement.results, {}
        with measurement.until_cut():
            for entry in entries:
                measurement.start(entry)
            measurement.run(bench.names)
            splits = {entry.label: bench.split(measurement, entry.precision) for entry in ours}
    found = bench.summaries(entries, results, reference)
    limits = bench.limits(hardware)
    shares, ratios = report.fractions(found, limits), report.ratios(found)
    split_tables = [f"{label}\n\n{split_table(rows)}" for label, rows in splits.items()]
    print_tables(report.table(found, limits), report.fraction_table(shares), *split_tables, report.ratio_table(ratios))
    if args.plots:
        show_plots(bench.folder, results, splits, found)
    for name, reason in failures.items():
        sys.stdout.write(f"{name}: not measured, or not in full: {reason.splitlines()[0]}\n")
    more = {
        "ratios": ratios,
        "fractions": shares,
        "limits": limits,
        "hardware": hardware,
        "split_ms": splits,
        "workload": bench.workload.sha256,
    }
    print_report("bench-peers", found, results, more)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

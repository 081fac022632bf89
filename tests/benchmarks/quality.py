"""`make bench-quality`: what each precision of each engine loses against fp32, on thousands of tokens of real text.

Licence texts are cut into windows of 512 tokens; every engine predicts the second half of each, token by token, with
the text before it as context. Compared with transformers in fp32: how often the most probable token is the same, and
how much worse the text's own tokens are predicted (NLL, natural logarithm, mean per token). Ours decodes the text by
its own steps (scoring.py), the others as their module in `contestants` says.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from tests.benchmarks.bench import PRECISIONS, Bench, make_parser, print_tables
from tests.benchmarks.bench_peers import gather
from tests.benchmarks.install_peers import Peers, demo_gguf
from tests.benchmarks.turns import ContestantFailed, note

Scores = Sequence[Mapping[str, Sequence[Any]]]  # per window: `logprobs` and `best`


@dataclass(frozen=True, slots=True)
class Quality:
    """How an engine's predictions compare with the reference's."""

    num_tokens: int
    same_best: float  # share of positions at which the most probable token is the same
    nll: float  # of the text, nats per token
    nll_change: float  # against the reference
    nll_change_error: float  # standard error of that, over the positions


def compare(scores: Scores, reference: Scores) -> Quality:
    """Compare position by position. Raises ValueError where both did not predict the same positions."""
    changes, same, nll = [], 0, 0.0
    for ours, theirs in zip(scores, reference, strict=True):
        for mine, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
            changes.append(other - mine)
            nll -= mine
        same += sum(a == b for a, b in zip(ours["best"], theirs["best"], strict=True))
    count = len(changes)
    error = statistics.stdev(changes) / math.sqrt(count) if count > 1 else 0.0
    return Quality(count, same / count, nll / count, statistics.fmean(changes), error)


def quality_table(found: Mapping[str, Quality]) -> str:
    rows = [
        [
            label,
            str(q.num_tokens),
            f"{q.same_best:.2%}",
            f"{q.nll:.4f}",
            f"{q.nll_change:+.4f} ± {q.nll_change_error:.4f}",
        ]
        for label, q in found.items()
    ]
    return report.markdown(["engine", "tokens", "same best token as fp32", "NLL", "change of NLL"], rows)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder for environments and models")
    parser.add_argument("--engines", default="vllm,openvino,llamacpp,transformers", help="peers; empty for none")
    parser.add_argument("--precisions", default="bf16,fp32,int8", help=f"ours, of {', '.join(PRECISIONS)}; or none")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp (default: the demo model's)")
    parser.add_argument("--windows", type=int, default=16, help="windows of text, at most 16")
    args = parser.parse_args()
    bench = Bench(args)
    gguf = args.gguf or (demo_gguf() if args.model == "demo" else None)
    order = {"score": args.windows}
    failures: dict[str, str] = {}
    found: dict[str, Quality] = {}
    with bench.measurement() as measurement:
        entries = [bench.our_entry(precision) for precision in args.precisions.split(",") if precision]
        names = [name for name in args.engines.split(",") if name]
        entries += gather(names, Peers(args.peers), bench, gguf, failures, quick=True) if names else []
        reference = bench.reference_scores(measurement, args.windows)
        for entry in entries:
            note(f"{entry.label}: predicting")
            try:
                answer = measurement.once(entry, order)
            except ContestantFailed as error:
                failures[entry.label] = str(error)
                continue
            if "unable" in answer:
                failures[entry.label] = answer["unable"]
            else:
                found[entry.label] = compare(answer["scores"], reference)
    print_tables(quality_table(found))
    for label, reason in failures.items():
        sys.stdout.write(f"{label}: no figure: {reason.splitlines()[0]}\n")
    line = {
        "target": "bench-quality",
        "num_windows": args.windows,
        "quality": {label: asdict(quality) for label, quality in found.items()},
        "failures": failures,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())

"""From runs to figures: the quietest runs count, medians of them are compared, and a table shows both. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

MAX_OTHERS: Final = 0.05  # share of the machine above which a run counts as disturbed


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one workload."""

    variant: int
    figures: Mapping[str, float]
    others_cpu: float  # share of the machine's CPU that other programs used meanwhile
    cpu_us_per_token: Mapping[str, float] = field(default_factory=dict)  # by part of the system


@dataclass(frozen=True, slots=True)
class Column:
    """A figure that is compared."""

    key: str  # in the report
    title: str
    workload: str
    figure: str
    digits: int
    more_is_better: bool


COLUMNS: Final = (
    Column("W1", "W1 out tok/s", "W1", "out_tok_s", 0, True),
    Column("W2_ttft", "W2 TTFT ms", "W2", "ttft_ms", 0, False),
    Column("W2_itl", "W2 ITL ms", "W2", "itl_ms", 1, False),
    Column("W3", "W3 prompt tok/s", "W3", "prompt_tok_s", 0, True),
    Column("W4", "W4 out tok/s", "W4", "out_tok_s", 0, True),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """What is said of one contestant."""

    name: str
    precision: str
    is_ours: bool
    figures: Mapping[str, float]  # by a column's key, medians; and RSS in MiB
    disturbed: frozenset[str]  # keys of figures that rest on a disturbed run
    partial: Mapping[str, int] = field(default_factory=dict)  # requests, by workload where not all were run
    ready_s: float = 0.0
    first_token_s: float = 0.0
    drift: Drift | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"


@dataclass(frozen=True, slots=True)
class Drift:
    """How far greedy outputs follow the reference."""

    num_identical: int
    num_compared: int
    mean_prefix: float  # share of an output before its first difference


def is_quiet(run: Run) -> bool:
    return run.others_cpu < MAX_OTHERS


def quietest(runs: Sequence[Run], wanted: int) -> list[Run]:
    """Return the runs that count: the `wanted` ones that others disturbed least, in the order they ran."""
    chosen = sorted(runs, key=lambda run: run.others_cpu)[:wanted]
    return [run for run in runs if run in chosen]


def median(runs: Iterable[Run], figure: str) -> float | None:
    """Return the median of a figure; None when no run has it."""
    values = [run.figures[figure] for run in runs if figure in run.figures]
    return statistics.median(values) if values else None


def drift(outputs: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> Drift:
    """Compare greedy outputs with the reference's, one by one."""
    shares = []
    for output, expected in zip(outputs, reference, strict=True):
        equal = (a == b for a, b in zip(output, expected, strict=False))
        num_equal = next((i for i, same in enumerate(equal) if not same), min(len(output), len(expected)))
        shares.append(num_equal / len(expected))
    return Drift(sum(share == 1 for share in shares), len(shares), statistics.fmean(shares))


def figures_of(runs: Mapping[str, Sequence[Run]], wanted: Mapping[str, int]) -> tuple[dict[str, float], frozenset[str]]:
    """Return medians by column key, and the keys that rest on a disturbed run."""
    figures: dict[str, float] = {}
    disturbed = set()
    for column in COLUMNS:
        counted = quietest(runs.get(column.workload, ()), wanted[column.workload])
        value = median(counted, column.figure)
        if value is not None:
            figures[column.key] = value
            if not all(map(is_quiet, counted)):
                disturbed.add(column.key)
    return figures, frozenset(disturbed)


def ratio(key: str, ours: float, other: float) -> float:
    """Return how many times better ours is: above 1 where ours is better, whatever better means for the figure."""
    more_is_better = any(column.key == key and column.more_is_better for column in COLUMNS)
    return ours / other if more_is_better else other / ours


def ratios(summaries: Sequence[Summary]) -> dict[str, dict[str, dict[str, float]]]:
    """Return ratios of ours to each peer by workload, precision and peer; within one precision only."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for key in [*(column.key for column in COLUMNS), "RSS"]:
        for ours in summaries:
            if not ours.is_ours or key not in ours.figures:
                continue
            peers = {
                peer.name: round(ratio(key, ours.figures[key], peer.figures[key]), 3)
                for peer in summaries
                if not peer.is_ours and peer.precision == ours.precision and key in peer.figures
            }
            if peers:
                result.setdefault(key, {})[ours.precision] = peers
    return result


# -- tables ----------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def table(summaries: Sequence[Summary], limits: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """Return figures of all contestants, below what the hardware allows (by precision) where that was measured."""
    head = ["engine", "precision", *(column.title for column in COLUMNS)]
    head += ["peak RSS MB", "ready s", "first token s", "same as fp32"]
    rows = [
        ["*limit*", f"*{precision}*", *(f"*{limit[c.key]:.{c.digits}f}*" for c in COLUMNS), "", "", "", ""]
        for precision, limit in (limits or {}).items()
    ]
    for summary in summaries:
        cells = [_cell(summary, column) for column in COLUMNS]
        memory = f"{summary.figures['RSS']:.0f}" if "RSS" in summary.figures else "-"
        same = "-"
        if summary.drift is not None:
            found = summary.drift
            same = f"{found.num_identical}/{found.num_compared} ({found.mean_prefix:.2f})"
        starts = [f"{summary.ready_s:.1f}", f"{summary.first_token_s:.1f}"]
        rows.append([summary.name, summary.precision, *cells, memory, *starts, same])
    text = markdown(head, rows)
    if any(summary.disturbed for summary in summaries):
        text += f"\n\\* others used {MAX_OTHERS:.0%} or more of the machine during a run that counts\n"
    return text


def _cell(summary: Summary, column: Column) -> str:
    value = summary.figures.get(column.key)
    if value is None:
        return "-"
    star = "*" if column.key in summary.disturbed else ""
    part = f" ({summary.partial[column.workload]} requests)" if column.workload in summary.partial else ""
    return f"{value:.{column.digits}f}{star}{part}"


def fractions(
    summaries: Sequence[Summary], limits: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return how much of the hardware's limit each figure reaches, by contestant's name and precision; 1 is all."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for summary in summaries:
        limit = limits.get(summary.precision)
        if limit is not None:
            result.setdefault(summary.name, {})[summary.precision] = {
                key: round(ratio(key, value, limit[key]), 3) for key, value in summary.figures.items() if key in limit
            }
    return result


def fraction_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the shares of the limit as percentages."""
    return markdown(
        ["share of the limit", "precision", *(column.title.rsplit(" ", 1)[0] for column in COLUMNS)],
        [
            [name, precision, *(f"{values[c.key]:.0%}" if c.key in values else "-" for c in COLUMNS)]
            for name, precisions in found.items()
            for precision, values in precisions.items()
        ],
    )


def ratio_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the ratios to each peer, and to the best of them; above 1 where ours is better."""
    keys = list(found)
    rows = []
    for precision in dict.fromkeys(precision for by in found.values() for precision in by):
        columns = [found[key].get(precision, {}) for key in keys]
        for peer in dict.fromkeys(peer for column in columns for peer in column):
            rows.append([peer, precision, *(f"{column[peer]:.2f}" if peer in column else "-" for column in columns)])
        best = [f"**{min(column.values()):.2f}**" if column else "-" for column in columns]
        rows.append(["**the best of them**", precision, *best])
    return markdown(["ours against", "precision", *keys], rows)

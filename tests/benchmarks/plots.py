"""Draws what the benchmarks measured, where matplotlib is installed (`pip install -e '.[bench]'`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.report import Summary
from tests.benchmarks.step_split import PARTS


class NoMatplotlib(Exception):
    """matplotlib is not installed."""


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise NoMatplotlib("plots need matplotlib: pip install -e '.[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
    return path


def plot_concurrency(sweeps: Mapping[str, Mapping[int, Mapping[str, float]]], folder: Path) -> Path:
    """Throughput and time between tokens against how many requests run at a time. Raises NoMatplotlib."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(11, 4.2))
    for label, points in sweeps.items():
        widths = sorted(points)
        left.plot(widths, [points[width]["out_tok_s"] for width in widths], marker="o", label=label)
        right.plot(widths, [points[width]["itl_p50_ms"] for width in widths], marker="o", label=f"{label}, p50")
        right.plot(
            widths, [points[width]["itl_p99_ms"] for width in widths], marker=".", ls="--", label=f"{label}, p99"
        )
    for axes, title in ((left, "output tokens per second"), (right, "ms between two tokens of a request")):
        axes.set(xlabel="requests running", title=title, xscale="log", ylim=(0, None))
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.grid(alpha=0.3)
        axes.legend()
    return _save(figure, folder / "concurrency.png")


def plot_split(splits: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """A step's time by part. Raises NoMatplotlib."""
    figure, axes = _pyplot().subplots(figsize=(9, 4.2))
    bars = [(f"{label}\n{name}", row) for label, rows in splits.items() for name, row in rows.items()]
    bottoms = [0.0] * len(bars)
    for part in PARTS:
        heights = [row[part] for _, row in bars]
        axes.bar([name for name, _ in bars], heights, bottom=bottoms, label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set(ylabel="ms", title="time of one step by part")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, folder / "step.png")


def plot_memory(summaries: Sequence[Summary], folder: Path) -> Path:
    """Peak resident memory of each engine. Raises NoMatplotlib."""
    figure, axes = _pyplot().subplots(figsize=(9, 0.5 * len(summaries) + 1.5))
    labels = [summary.label for summary in summaries]
    bars = axes.barh(labels, [summary.figures["RSS"] for summary in summaries])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="MiB", title="peak resident memory")
    return _save(figure, folder / "memory.png")


def draw(
    folder: Path,
    sweeps: Mapping[str, Mapping[int, Mapping[str, float]]],
    splits: Mapping[str, Mapping[str, Any]],
    summaries: Sequence[Summary],
) -> list[Path]:
    """Draw what there is, and return the files. Raises NoMatplotlib."""
    paths = [plot_concurrency(sweeps, folder)] if sweeps else []
    paths += [plot_split(splits, folder)] if splits else []
    return [*paths, plot_memory(summaries, folder)]

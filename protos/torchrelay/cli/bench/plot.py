"""Pictures of runs: latency, throughput and goodput against the load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from torchrelay.cli.bench.records import Record
from torchrelay.cli.bench.samples import Run

_DPI: Final = 100
_Figure = Callable[[Record, Run], float | None]


class NoMatplotlib(Exception):
    """matplotlib is not installed."""


def _percentile(name: str, percent: int) -> _Figure:
    return lambda record, run: run.report(record.slo)[name].get(f"p{percent}")


def _goodput(record: Record, run: Run) -> float | None:
    return run.goodput(record.slo)["fraction"] * 100 if record.slo else None


# File, title, and lines: what each is called (besides its run) and its height.
_PANELS: Final[tuple[tuple[str, str, tuple[tuple[str, _Figure], ...]], ...]] = (
    ("ttft", "time to first token, ms", tuple((f"p{p}", _percentile("ttft_ms", p)) for p in (50, 99))),
    ("itl", "time between tokens, ms", tuple((f"p{p}", _percentile("itl_ms", p)) for p in (50, 99))),
    ("throughput", "output tokens/s", (("", lambda record, run: run.report()["output_tokens_per_s"]),)),
    ("goodput", "requests within the objectives, %", (("", _goodput),)),
)


def draw(records: Sequence[tuple[str, Record]], folder: Path) -> list[Path]:
    """Draw runs, each under its label, and return the files: one for each figure, and bench.png with all of them.

    Goodput is drawn where runs have objectives. Raises NoMatplotlib, OSError, and ValueError for runs that do not share
    an axis.
    """
    modes = {run.level.is_open for _, record in records for run in record.runs}
    if len(modes) != 1:
        raise ValueError("runs by callers (--concurrency) and by arrivals (--rate) do not share an axis")
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    has_slo = any(record.slo for _, record in records)
    panels = [panel for panel in _PANELS if panel[0] != "goodput" or has_slo]
    axis = "arrivals a second" if modes.pop() else "callers"
    paths = []
    for panel in panels:
        figure, axes = pyplot.subplots(figsize=(6, 4))
        _draw_panel(axes, panel, records, axis)
        paths.append(_save(pyplot, figure, folder / f"{panel[0]}.png"))
    rows = -(-len(panels) // 2)
    figure, grid = pyplot.subplots(rows, 2, figsize=(10, 3.2 * rows), squeeze=False)
    for axes, panel in zip_longest(grid.flat, panels):
        if panel is None:
            axes.axis("off")
        else:
            _draw_panel(axes, panel, records, axis)
    return [*paths, _save(pyplot, figure, folder / "bench.png")]


def _draw_panel(axes: Any, panel: tuple[str, str, Any], records: Sequence[tuple[str, Record]], axis: str) -> None:
    name, title, lines = panel
    for color, (label, record) in enumerate(records):
        for (what, height), style in zip(lines, ("-", "--"), strict=False):
            runs = sorted(record.runs, key=lambda run: run.level.value)
            points = [(run.level.value, value) for run in runs if (value := height(record, run)) is not None]
            if points:
                named = " ".join(part for part in (label, what) if part)
                axes.plot(*zip(*points, strict=True), style, color=f"C{color}", marker="o", markersize=4, label=named)
        if name == "goodput" and record.slo is not None:
            axes.axhline(record.target * 100, color=f"C{color}", linewidth=0.8, linestyle=":")
    axes.set(title=title, xlabel=axis, ylim=(0, 105 if name == "goodput" else None))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return path


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise NoMatplotlib("pictures need matplotlib: pip install 'torchrelay-client[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

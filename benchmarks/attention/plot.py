"""The plot of attention: how many times our time the others take, over the length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import bars, drawing
from benchmarks.attention.table import columns
from benchmarks.drawing import INK, OURS, digits, plt
from mmer_fast.bench.attention.contestants import PLAIN, WEIGHT_GRADIENT
from mmer_fast.bench.harness import FORWARD_BACKWARD

_COLOURS = ("#1d4e89", "#4f86c6", "#6b7280", "#2f7d6b", "#8d6bb0", "#b08a3c", "#a3a9b2", "#5b6470")


def _panel(axes: Axes, result: dict[str, Any], task: str, dtype: str, device: str) -> None:
    cases = [case for case in columns(result, device) if case.dtype == dtype and case.padded]
    lengths = [case.length for case in cases]
    rows = [row for row in result["rows"] if not row["ours"] and row["task"] == task]
    ends: dict[str, tuple[float, str]] = {}
    for index, name in enumerate(dict.fromkeys(row["contestant"] for row in rows)):
        found = [bars.find(result, case.name, FORWARD_BACKWARD, name) for case in cases]
        points = [(n, row["ratio"]) for n, row in zip(lengths, found, strict=True) if row is not None]
        if points:
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, marker="o", ms=4)
            ends[name] = points[-1][1], colour
    axes.plot((min(lengths), max(lengths)), (1.0, 1.0), color=OURS, lw=2.6, marker="o", ms=4)
    ends["mmer_fast"] = 1.0, OURS
    names = sorted(ends, key=lambda name: ends[name][0])
    for name, height in zip(names, drawing.spread([ends[n][0] for n in names], 1.2), strict=True):
        axes.text(max(lengths) * 1.12, height, name, va="center", fontsize=8.5, color=ends[name][1])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{digits(ratio)}x"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(lengths) * 0.85, max(lengths) * 6)
    axes.grid(color="#eceef1")
    axes.set_title(f"{dtype}, {task}", loc="left", fontsize=10, color=INK)


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draws a panel for each dtype and task into the PNG `path`."""
    device = result["device"]
    dtypes = list(dict.fromkeys(case.dtype for case in columns(result, device) if case.padded))
    figure, grid = plt.subplots(
        max(1, len(dtypes)),
        2,
        figsize=(12, 3.6 * max(1, len(dtypes))),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for row, dtype in zip(grid, dtypes, strict=False):
        for axes, task in zip(row, (PLAIN, WEIGHT_GRADIENT), strict=True):
            drawing.style(axes)
            _panel(axes, result, task, dtype, device)
    title = "Attention, 50 % padding, forward + backward: how many times our time, over the length"
    return drawing.finish(figure, title, result, path)

"""The plot of the sweeps: for each the time over what grows, and below it the share of the roofline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from benchmarks import drawing
from benchmarks.drawing import INK, OURS, plt, short_count, time_label
from benchmarks.scaling.fit import upper_half
from benchmarks.scaling.sweeps import Sweep
from benchmarks.scaling.table import measured, points

_COLUMNS = 3
_PEERS = ("#1d4e89", "#8a8f98")


def _panels(time: Axes, share: Axes, result: dict[str, Any], sweep: Sweep) -> None:
    for index, name in enumerate(sweep.contestants):
        rows = points(result, sweep, name)
        if not rows:
            continue
        colour, width = (OURS, 2.2) if index == 0 else (_PEERS[index - 1], 1.4)
        xs = [row["at"] for row in rows]
        time.plot(xs, [row["us"] for row in rows], color=colour, lw=width, marker="o", ms=3.5, label=name)
        share.plot(xs, [row["roofline"] for row in rows], color=colour, lw=width, marker="o", ms=3.5)
    rows = points(result, sweep, sweep.contestants[0])
    law = upper_half([row["at"] for row in rows], [row["us"] for row in rows])
    time.set_title(f"{sweep.operator}, exponent {law.exponent:.2f}", loc="left", fontsize=9.5, color=INK)
    time.set_yscale("log")
    time.yaxis.set_major_formatter(FuncFormatter(time_label))
    low, high = time.get_ylim()
    time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    time.yaxis.set_minor_locator(NullLocator())
    time.legend(fontsize=7, frameon=False)
    share.set_ylim(0, max(1.0, *share.get_ylim()))
    share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    share.set_xlabel(f"{sweep.axis}\n{sweep.fixed}", fontsize=8, color=INK)
    for axes in (time, share):
        axes.set_xscale("log")
        axes.set_xticks([row["at"] for row in rows], [short_count(row["at"]) for row in rows], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color="#eceef1")


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draws a column for each sweep into the PNG `path`."""
    sweeps = measured(result)
    lines = max(1, math.ceil(len(sweeps) / _COLUMNS))
    figure, grid = plt.subplots(
        2 * lines,
        _COLUMNS,
        figsize=(3.4 * _COLUMNS, 4.6 * lines),
        gridspec_kw={"height_ratios": [1.6, 1] * lines},
        layout="constrained",
    )
    for index in range(lines * _COLUMNS):
        line, column = divmod(index, _COLUMNS)
        pair = grid[2 * line, column], grid[2 * line + 1, column]
        for axes in pair:
            drawing.style(axes)
            axes.set_visible(index < len(sweeps))
        if index < len(sweeps):
            _panels(*pair, result, sweeps[index])
    title = "Growth of the cost: time of a call, and below it its share of the roofline"
    return drawing.finish(figure, title, result, path)

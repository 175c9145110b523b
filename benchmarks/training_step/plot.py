"""The plot of the training step: the time of a step of every contestant, a panel a case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks import drawing
from benchmarks.drawing import INK, OURS, digits, plt, time_label
from benchmarks.training_step.table import measured
from mmer_fast.bench.harness import OK, Row


def _panel(axes: Axes, rows: list[Row]) -> None:
    """A bar a contestant, the first at the top."""
    longest = max(row["us"] for row in rows)
    for y, row in enumerate(reversed(rows)):
        axes.barh(y, row["us"], height=0.66, color=OURS if row["ours"] else "#1d4e89")
        text = f"{time_label(row['us'])}   {digits(row['ratio'])}×"  # noqa: RUF001
        axes.text(row["us"] + 0.012 * longest, y, text, va="center", fontsize=8.5, color=INK)
    axes.set_xlim(0, longest * 1.3)
    axes.set_xticks([])
    axes.set_yticks(range(len(rows)), [row["contestant"] for row in reversed(rows)])
    first = rows[0]
    axes.set_title(f"{first['case']}, {first['samples']} samples", loc="left", fontsize=10, color=INK)


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draws a panel for each case into the PNG `path`."""
    rows = [row for row in result["rows"] if row["status"] == OK]
    panels = [[row for row in rows if row["case"] == case] for case in measured({"rows": rows})]
    height = 0.6 + sum(0.6 + 0.34 * len(panel) for panel in panels)
    figure, grid = plt.subplots(len(panels), 1, figsize=(10, height), squeeze=False, layout="constrained")
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        drawing.style(axes)
        _panel(axes, panel)
    title = "A training step of RobMMR, and how many times the fast step in float32"
    return drawing.finish(figure, title, result, path)

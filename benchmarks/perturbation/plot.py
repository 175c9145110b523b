"""The plot of the weight perturbation: the time of a cycle of every contestant, for both sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks import drawing
from benchmarks.drawing import INK, OURS, digits, plt, time_label
from benchmarks.perturbation.table import SIZES, measured
from mmer_fast.bench.harness import OK, Row

_EXACT, _MOVED, _INEXACT, _YARD = "#1d4e89", "#6f9fd0", "#b08a3c", "#b9bec6"


def _colour(row: Row) -> str:
    if row["ours"]:
        return OURS
    if row["yardstick"]:
        return _YARD
    if not row["exact"]:
        return _INEXACT
    return _EXACT if row["keeps_storage"] else _MOVED


def _panel(axes: Axes, rows: list[Row], names: list[str]) -> None:
    """A bar a contestant, in the order of `names`, the first at the top."""
    by_name = {row["contestant"]: row for row in rows}
    shown = [by_name[name] for name in names if name in by_name]
    longest = max(row["us"] for row in shown)
    for y, name in enumerate(reversed(names)):
        if (row := by_name.get(name)) is None:
            continue
        inexact = not row["yardstick"] and not row["exact"]
        axes.barh(
            y, row["us"], height=0.66, color=_colour(row), hatch="////" if inexact else None, edgecolor="white", lw=0
        )
        text = time_label(row["us"])
        if not row["ours"]:
            text += f"   {digits(row['ratio'])}×"  # noqa: RUF001
        axes.text(row["us"] + 0.012 * longest, y, text, va="center", fontsize=8.5, color=INK)
    axes.set_xlim(0, longest * 1.22)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda us, _: "0" if us == 0 else time_label(us)))
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#eceef1")
    first = shown[0]
    title = f"{first['case']} parameters in {first['tensors']} tensors, {first['dtype']}"
    axes.set_title(title, loc="left", fontsize=10, color=INK)


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draws a panel for each size into the PNG `path`."""
    rows = [row for row in result["rows"] if row["status"] == OK]
    chosen = [case for case in measured({"rows": rows}) if case in SIZES] or measured({"rows": rows})[:1]
    panels = [[row for row in rows if row["case"] == case] for case in chosen]
    last = {row["contestant"]: row for row in panels[-1]}
    everybody = dict.fromkeys(row["contestant"] for panel in reversed(panels) for row in panel)
    names = sorted(everybody, key=lambda name: last[name]["us"] if name in last else 0.0)
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(12, 1.5 + 0.34 * len(names)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        drawing.style(axes)
        _panel(axes, panel, names)
    colours = {row["contestant"]: _colour(row) for row in rows}
    grid[0][0].set_yticks(range(len(names)), list(reversed(names)))
    for label, name in zip(grid[0][0].get_yticklabels(), reversed(names), strict=True):
        label.set_color("#6b7280" if colours[name] == _YARD else colours[name])
        label.set_fontweight("bold" if colours[name] == OURS else "normal")
    title = "Weight perturbation: time of a cycle (norm, perturb, restore), and how many times ours\n"
    title += "Dark: the bits come back, in place. Light: in other memory. Hatched: not exact. Grey: a copy"
    return drawing.finish(figure, title, result, path)

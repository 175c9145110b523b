"""Plots of an ablation: a panel for each measure, as one picture file or as pictures inside a page.

A mean is a large dot with a bar of one sample standard deviation; the runs behind it are small dots. Curves have a band
of one standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mmer_fast._files import write_atomically
from mmer_fast.ablation.names import plot_name
from mmer_fast.ablation.results import RowResult, Statistic, SuiteResults
from mmer_fast.ablation.tables import part_title
from mmer_fast.report.curves import style_axes, style_epochs
from mmer_fast.report.page import Html, join, tag
from mmer_fast.report.published import METRICS as PUBLISHED_METRICS
from mmer_fast.report.svg import inline_svg
from mmer_fast.report.tables import shift_names
from mmer_fast.report.theme import BLUE, GRID, INK, MUTED, ORANGE, RUN_COLOURS

MOST_COLUMNS = 3
WIDTH = 4.4
"""Panels beside each other in the picture file, and inches of each."""
CURVES = {
    "micro-F1, training": ("train", "micro_f1"),
    "micro-F1, validation": ("valid", "micro_f1"),
    "Recognition loss, training": ("train", "recognition"),
    "Recognition loss, validation": ("valid", "recognition"),
}


@dataclass(frozen=True)
class Panel:
    """Something to draw: its title, and how."""

    title: str
    draw: Callable[[Axes], None]


def write_plot(results: SuiteResults, path: Path) -> None:
    """Write all panels as one picture, atomically; the suffix says the format."""
    panels = suite_panels(results)
    lines = -(-len(panels) // MOST_COLUMNS)
    columns = -(-len(panels) // lines)
    figure = Figure(figsize=(WIDTH * columns, _height(results) * lines + 0.5), layout="constrained", dpi=150)
    figure.suptitle(results.plan.suite.title, x=0.01, ha="left", color=INK, fontsize=13, fontweight="bold")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw(axes)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    write_atomically(path, figure.savefig)


def plot_html(results: SuiteResults) -> Html:
    """All panels for a page."""
    pictures = []
    for i, panel in enumerate(suite_panels(results)):
        figure = Figure(figsize=(WIDTH, _height(results)), layout="constrained")
        panel.draw(figure.subplots())
        pictures.append(tag("figure", inline_svg(figure, f"panel{i}", f"{results.plan.suite.title}: {panel.title}")))
    return tag("div", join(pictures), class_="panels")


def _height(results: SuiteResults) -> float:
    return 1.2 + 0.24 * len(results.rows) if results.plan.suite.plot == "bars" else 3.2


def suite_panels(results: SuiteResults) -> list[Panel]:
    """The panels of a suite, as its `plot` says."""
    if results.plan.suite.plot == "curves":
        return [_curve_panel(results, title, path) for title, path in CURVES.items()]
    known = shift_names(str(results.plan.data["source"]))
    measures = {"test/micro_f1": "micro-F1, test"}
    measures |= {name: f"micro-F1, {part_title(name, known)}" for name in results.names("part/")}
    measures["gap/test"] = "Gap, training to test"
    draw = _draw_sweep if results.plan.suite.plot == "sweep" else _draw_bars
    panels = [_measure_panel(results, title, name, draw) for name, title in measures.items()]
    if results.plan.suite.plot == "bars" and len(results.published) > 1:
        panels.append(_published_panel(results))
    return panels


def _measure_panel(
    results: SuiteResults, title: str, name: str, draw: Callable[[Axes, SuiteResults, str], None]
) -> Panel:
    def drawn(axes: Axes) -> None:
        draw(axes, results, name)
        axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")

    return Panel(title, drawn)


def _draw_bars(axes: Axes, results: SuiteResults, name: str) -> None:
    """A line for each row, in the order of the table; the first row's mean runs through all of them."""
    _style_rows(axes, results.rows)
    for place, row in enumerate(results.rows):
        values = _values(row, name)
        axes.plot(values, [place] * len(values), "o", color=INK, markersize=2.5, zorder=3)
        _dot(axes, row.statistic(name), place, vertical=False, colour=ORANGE if row is results.base else BLUE)
    base = results.base.statistic(name)
    if base is not None:
        axes.axvline(base.mean, color=ORANGE, linewidth=1, linestyle="--")


def _style_rows(axes: Axes, rows: Sequence[RowResult]) -> None:
    style_axes(axes, "", "")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID)
    axes.set_yticks(range(len(rows)), [plot_name(row.planned.row.name) for row in rows], color=INK, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _values(row: RowResult, name: str) -> list[float]:
    return [result.values[name] for result in row.results.values() if name in result.values]


def _dot(axes: Axes, statistic: Statistic | None, place: float, *, vertical: bool, colour: str) -> None:
    if statistic is None:
        return
    x, y = (place, statistic.mean) if vertical else (statistic.mean, place)
    error: dict[str, Any] = {"yerr" if vertical else "xerr": statistic.std}
    axes.errorbar([x], [y], **error, fmt="o", color=colour, markersize=5, elinewidth=1.6)


def _draw_sweep(axes: Axes, results: SuiteResults, name: str) -> None:
    """Means over the numbers that the suite gives its rows, joined by a line; a row without a number is a level."""
    suite = results.plan.suite
    style_axes(axes, "", suite.sweep_label)
    places, means = [], []
    for row in results.rows:
        statistic, place = row.statistic(name), suite.sweep.get(row.planned.row.slug)
        if statistic is None:
            continue
        if place is None:
            axes.axhline(statistic.mean, color=ORANGE, linewidth=1, linestyle="--")
            label = plot_name(row.planned.row.name)
            axes.legend([Line2D([], [], color=ORANGE, linestyle="--")], [label], frameon=False, fontsize=9)
            continue
        values = _values(row, name)
        axes.plot([place] * len(values), values, "o", color=INK, markersize=2.5, zorder=3)
        _dot(axes, statistic, place, vertical=True, colour=BLUE)
        places.append(place)
        means.append(statistic.mean)
    axes.plot(places, means, color=BLUE)


def _published_panel(results: SuiteResults) -> Panel:
    title = "micro-F1, published (CMU-MOSEI)"

    def draw(axes: Axes) -> None:
        _style_rows(axes, results.rows)
        axes.set_title(title, loc="left", color=MUTED, fontsize=11, fontweight="bold")
        f1 = PUBLISHED_METRICS.index("micro_f1")
        for place, row in enumerate(results.rows):
            if row.planned.row.published is not None:
                axes.plot([row.planned.row.published[f1]], [place], "D", color=MUTED, markersize=4)

    return Panel(title, draw)


def _curve_panel(results: SuiteResults, title: str, path: tuple[str, str]) -> Panel:
    def draw(axes: Axes) -> None:
        style_epochs(axes, title)
        handles = []
        for i, row in enumerate(results.rows):
            colour = RUN_COLOURS[i % len(RUN_COLOURS)]
            curves = [[record[path[0]][path[1]] for record in result.history] for result in row.results.values()]
            if curves:
                _draw_curve(axes, curves, colour)
                handles.append(Line2D([], [], color=colour, label=plot_name(row.planned.row.name)))
        if handles:
            axes.legend(handles=handles, frameon=False, labelcolor=INK, fontsize=9)

    return Panel(title, draw)


def _draw_curve(axes: Axes, curves: Sequence[Sequence[float]], colour: str) -> None:
    """Mean and spread of the curves of seeds, in each epoch over those that did not stop before it."""
    epochs = range(1, max(map(len, curves)) + 1)
    found = [Statistic.of([curve[epoch - 1] for curve in curves if len(curve) >= epoch]) for epoch in epochs]
    mean_e = np.array([statistic.mean for statistic in found if statistic is not None])
    axes.plot(epochs, mean_e, "-o", color=colour, markersize=3)
    if len(curves) > 1:
        std_e = np.array([statistic.std or 0.0 for statistic in found if statistic is not None])
        axes.fill_between(epochs, mean_e - std_e, mean_e + std_e, color=colour, alpha=0.15, linewidth=0)

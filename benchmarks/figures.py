"""The figures of the page: what stands in the PNGs, in the page's own colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from benchmarks.drawing import short_count, time_label
from benchmarks.scaling.sweeps import Sweep
from benchmarks.scaling.table import points
from mmer_fast.bench.harness import OK, Row
from mmer_fast.report.page import Html, tag
from mmer_fast.report.svg import inline_svg
from mmer_fast.report.theme import BLUE, GREEN, GRID, INK, MUTED, ORANGE

_COLOURS = (ORANGE, BLUE, GREEN)  # ours first


def overview(operator: str, rows: Sequence[Row]) -> Html:
    """Two panels over the cases: everybody's time over ours, and the share of the roofline that ours reaches."""
    measured = [row for row in rows if row["status"] == OK and "ratio" in row]
    shares = [row for row in measured if row["ours"] and "roofline" in row]
    panels = [_case_panel(f"{operator}-ratio", "times our time, each dot a contestant", measured, "ratio")]
    if shares:
        panels.append(_case_panel(f"{operator}-roofline", "share of the roofline, ours", shares, "roofline"))
    return tag("div", *panels, class_="panels")


def _case_panel(name: str, title: str, rows: Sequence[Row], figure_of: str) -> Html:
    places = list(dict.fromkeys(f"{row['case']} {row['pass']}" for row in rows))
    figure, axes = _new_figure(1.0 + 0.24 * len(places))
    for own in (False, True):
        chosen = [row for row in rows if row["ours"] == own]
        ys = [-places.index(f"{row['case']} {row['pass']}") for row in chosen]
        colour, layer = (ORANGE, 3) if own else (MUTED, 2)
        axes.plot([row[figure_of] for row in chosen], ys, "o", ms=4, color=colour, zorder=layer, mew=0)
    axes.set_yticks([-i for i in range(len(places))], places, fontsize=7)
    axes.set_ylim(0.7 - len(places), 0.7)
    if figure_of == "ratio":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(_marks(*axes.get_xlim()))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, max(1.0, *axes.get_xlim()))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.suptitle(title, x=0.01, ha="left", fontsize=8.5, color=INK)
    return tag("figure", inline_svg(figure, name, f"{title}; by case: {', '.join(places)}"))


def growth(result: dict[str, Any], sweep: Sweep) -> Html:
    """Time over what grows, and below it the share of the roofline."""
    figure = Figure(figsize=(3.8, 3.6), layout="constrained")
    time, share = figure.subplots(2, 1, height_ratios=(1.7, 1), sharex=True)
    names = [name for name in sweep.contestants if points(result, sweep, name)]
    for name, colour in zip(names, _COLOURS, strict=False):
        rows = points(result, sweep, name)
        xs = [row["at"] for row in rows]
        time.plot(xs, [row["us"] for row in rows], color=colour, lw=1.6, marker="o", ms=3.5, label=name)
        share.plot(xs, [row["roofline"] for row in rows], color=colour, lw=1.6, marker="o", ms=3.5)
    xs = [row["at"] for row in points(result, sweep, sweep.contestants[0])]
    for axes in (time, share):
        _style(axes)
        axes.grid(color=GRID)
    time.set_xscale("log")
    share.set_xticks(xs, [short_count(x) for x in xs])
    share.xaxis.set_minor_locator(NullLocator())
    time.set_yscale("log")
    time.yaxis.set_major_locator(_marks(*time.get_ylim()))
    time.yaxis.set_major_formatter(FuncFormatter(time_label))
    time.yaxis.set_minor_locator(NullLocator())
    time.set_title(sweep.operator, loc="left", fontsize=9, color=INK)
    time.legend(fontsize=7, frameon=False, labelcolor=INK)
    share.set_ylim(0, max(1.0, *share.get_ylim()))
    share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    share.set_xlabel(f"{sweep.axis}; {sweep.fixed}", fontsize=7.5, color=INK)
    described = f"{sweep.operator}: time of a call and share of the roofline over {sweep.axis}, {sweep.fixed}"
    return tag("figure", inline_svg(figure, sweep.name, described))


def _marks(low: float, high: float) -> LogLocator:
    """Where a log axis has its marks: at powers of ten, and between them where it spans few."""
    return LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,))


def _new_figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.8, height), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    axes.grid(axis="x", color=GRID)
    return figure, axes


def _style(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, colors=MUTED, labelsize=7.5)
    axes.set_axisbelow(True)

"""Losses and scores by epoch: one picture of a run, and panels in which several runs lie over each other.

One run has a colour for each quantity. Several runs have a colour each, and a line style for each quantity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mmer_fast._files import write_atomically
from mmer_fast.report.page import Html, join, tag
from mmer_fast.report.svg import inline_svg
from mmer_fast.report.theme import BLUE, GREEN, GRID, INK, MUTED, ORANGE, RUN_COLOURS

LINE_STYLES = ("-", "--", ":", "-.")
PANEL_INCHES = (3.6, 2.8)


@dataclass(frozen=True)
class Curve:
    """A quantity of the history.

    Attributes:
        path: the keys that lead to it in a record.
        label: of its line.
        colour: of its line where there is one run.
    """

    path: tuple[str, ...]
    label: str
    colour: str

    def values(self, history: Sequence[Mapping[str, Any]]) -> list[float] | None:
        """One value an epoch; None if an epoch lacks it or it is 0 throughout (a part that was left out)."""
        found: list[Any] = list(history)
        for key in self.path:
            found = [None if record is None else record.get(key) for record in found]
        if any(value is None for value in found) or not any(found):
            return None
        return [float(value) for value in found]


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes, under a title."""

    title: str
    curves: tuple[Curve, ...]
    logarithmic: bool = False
    marks_best: bool = False


PANELS = (
    Panel(
        "Recognition loss",
        (
            Curve(("train", "recognition"), "train, input as it is", BLUE),
            Curve(("train", "masked"), "train, masked by ATM", ORANGE),
            Curve(("valid", "recognition"), "validation", GREEN),
        ),
    ),
    Panel(
        "Adversarial perturbation",
        (
            Curve(("train", "perturbed"), "loss", GREEN),
            Curve(("gradient_ratio",), "its gradient / that of the rest", MUTED),
        ),
        logarithmic=True,
    ),
    Panel(
        "micro-F1",
        (
            Curve(("valid", "micro_f1"), "validation", BLUE),
            Curve(("train", "micro_f1"), "train", MUTED),
        ),
        marks_best=True,
    ),
)


_KNOWN = {curve.path for panel in PANELS for curve in panel.curves}
_COLOURS = (ORANGE, GREEN, BLUE, MUTED)


def panels_of(runs: Sequence[RunCurves]) -> tuple[Panel, ...]:
    """`PANELS`, and after the first a panel of the other parts of the losses of sister systems, if there are any."""
    names = dict.fromkeys(
        name for run in runs for record in run.history for name in record["train"] if ("train", name) not in _KNOWN
    )
    if not names:
        return PANELS
    curves = tuple(
        Curve(("train", name), name.replace("_", " "), _COLOURS[i % len(_COLOURS)]) for i, name in enumerate(names)
    )
    return (PANELS[0], Panel("Other parts of the loss", curves, logarithmic=True), *PANELS[1:])


@dataclass(frozen=True)
class RunCurves:
    """What is drawn of a run: its name, its history as `Trainer.fit` returns it, the chosen epoch from 1."""

    name: str
    history: Sequence[Mapping[str, Any]]
    best_epoch: int | None = None


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path, *, best_epoch: int | None = None) -> None:
    """Draw losses and micro-F1 by epoch and write them to `path` (its suffix says the format), atomically.

    Args:
        history: one record an epoch, as `Trainer.fit` returns them.
        best_epoch: marked in the right panel, counted from 1.
    """
    run = RunCurves("", history, best_epoch)
    panels = panels_of([run])
    figure = Figure(figsize=(13 / 3 * len(panels), 3.8), layout="constrained", dpi=150)
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _draw(axes, panel, [run])
    write_atomically(path, figure.savefig)


def curve_panels(runs: Sequence[RunCurves]) -> Html:
    """The panels as pictures for a page, without those that have nothing to show.

    Args:
        runs: at least one, in the order of their colours.
    """
    pictures = []
    for i, panel in enumerate(panels_of(runs)):
        if any(curve.values(run.history) for curve in panel.curves for run in runs):
            figure = Figure(figsize=PANEL_INCHES, layout="constrained")
            _draw(figure.subplots(), panel, runs)
            pictures.append(tag("figure", inline_svg(figure, f"curves{i}", f"{panel.title} by epoch")))
    return tag("div", join(pictures), class_="panels")


def _draw(axes: Axes, panel: Panel, runs: Sequence[RunCurves]) -> None:
    style_epochs(axes, panel.title)
    alone = len(runs) == 1
    legend: dict[str, Line2D] = {}
    for curve, line_style in zip(panel.curves, LINE_STYLES, strict=False):
        for i, run in enumerate(runs):
            values = curve.values(run.history)
            if values is None:
                continue
            epochs = [record["epoch"] for record in run.history]
            colour = curve.colour if alone else RUN_COLOURS[i % len(RUN_COLOURS)]
            style: Any = "-" if alone else line_style
            axes.plot(epochs, values, style, color=colour, marker="o", markersize=3)
            legend[curve.label] = Line2D([], [], color=colour if alone else MUTED, linestyle=style)
            if panel.logarithmic and min(values) > 0:
                axes.set_yscale("log")
    if panel.marks_best:
        _mark_best(axes, runs, legend)
    if legend:
        axes.legend(list(legend.values()), list(legend), frameon=False, labelcolor=INK, fontsize=9)


def _mark_best(axes: Axes, runs: Sequence[RunCurves], legend: dict[str, Line2D]) -> None:
    """A ring around the chosen epoch of each run."""
    ring: dict[str, Any] = {
        "linestyle": "",
        "marker": "o",
        "markersize": 9,
        "markerfacecolor": "none",
        "markeredgewidth": 1.8,
    }
    for i, run in enumerate(runs):
        chosen = [record for record in run.history if record["epoch"] == run.best_epoch]
        if not chosen:
            continue
        epoch, value = chosen[0]["epoch"], chosen[0]["valid"]["micro_f1"]
        colour = ORANGE if len(runs) == 1 else RUN_COLOURS[i % len(RUN_COLOURS)]
        axes.plot([epoch], [value], color=colour, **ring)
        label = f"chosen: epoch {epoch}, {value:.3f}" if len(runs) == 1 else "chosen epoch"
        legend[label] = Line2D([], [], color=colour if len(runs) == 1 else MUTED, **ring)


def style_epochs(axes: Axes, title: str) -> None:
    """The look of a plot over epochs, which are whole, also where there is one."""
    style_axes(axes, title, "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def style_axes(axes: Axes, title: str, x_label: str, y_label: str = "") -> None:
    """The look that all plots share."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)

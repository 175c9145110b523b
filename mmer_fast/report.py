"""Pictures of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmer_fast.training.checkpoint import write_atomically

INK, MUTED, GRID = "#222222", "#777777", "#e6e6e6"
BLUE, ORANGE, GREEN = "#2f6db3", "#d9731a", "#3a8f5c"


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path, *, best_epoch: int | None = None) -> None:
    """Draw losses and micro-F1 by epoch and write them to `path` (its suffix says the format), atomically.

    Args:
        history: one record an epoch, as `Trainer.fit` returns them.
        best_epoch: marked in the right panel, counted from 1.
    """
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    losses, scores = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in history]

    _style(losses, "Training losses")
    names = (("recognition", r"$L_r$ recognition", BLUE), ("masked", r"$L_m$ masked", ORANGE))
    for key, label, colour in (*names, ("perturbed", r"$L_p$ perturbed", GREEN)):
        values = [record["train"][key] for record in history]
        if any(values):
            losses.plot(epochs, values, color=colour, marker="o", markersize=3.5, label=label)
    losses.set_yscale("log")
    losses.legend(frameon=False, labelcolor=INK)

    _style(scores, "micro-F1")
    for key, label, colour in (("train", "train", MUTED), ("valid", "validation", BLUE)):
        values = [record[key]["micro_f1"] for record in history]
        scores.plot(epochs, values, color=colour, marker="o", markersize=3.5, label=label)
    if best_epoch is not None:
        value = history[best_epoch - 1]["valid"]["micro_f1"]
        scores.plot(
            [best_epoch],
            [value],
            "o",
            color=ORANGE,
            markersize=8,
            label=f"chosen: epoch {best_epoch}, {value:.3f}",
        )
    scores.legend(frameon=False, labelcolor=INK)

    write_atomically(path, figure.savefig)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel("epoch", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)

"""Pictures of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmer_fast._files import write_atomically

INK, MUTED, GRID = "#222222", "#777777", "#e6e6e6"
BLUE, ORANGE, GREEN = "#2f6db3", "#d9731a", "#3a8f5c"


PERTURBATION_CURVES = (
    ("perturbed", r"$L_p$", GREEN),
    ("gradient_ratio", r"$\|\nabla L_p\| \;/\; \|\nabla (L_r + \rho L_m)\|$", MUTED),
)


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path, *, best_epoch: int | None = None) -> None:
    """Draw losses and micro-F1 by epoch and write them to `path` (its suffix says the format), atomically.

    Args:
        history: one record an epoch, as `Trainer.fit` returns them.
        best_epoch: marked in the right panel, counted from 1.
    """
    figure = Figure(figsize=(13, 3.8), layout="constrained", dpi=150)
    recognition, consistency, scores = figure.subplots(1, 3)
    epochs = [record["epoch"] for record in history]

    def draw(axes: Axes, values: list[float], colour: str, label: str) -> None:
        axes.plot(epochs, values, color=colour, marker="o", markersize=3.5, label=label)

    _style(recognition, "Recognition loss in training")
    draw(recognition, [record["train"]["recognition"] for record in history], BLUE, r"$L_r$, input as it is")
    masked = [record["train"]["masked"] for record in history]
    if any(masked):
        draw(recognition, masked, ORANGE, r"$L_m$, most telling units masked")
    recognition.legend(frameon=False, labelcolor=INK)

    _style(consistency, "Adversarial perturbation in training")
    for key, label, colour in PERTURBATION_CURVES:
        values = [record["train"][key] if key in record["train"] else record[key] for record in history]
        if all(values):
            draw(consistency, values, colour, label)
            consistency.set_yscale("log")
    if consistency.lines:
        consistency.legend(frameon=False, labelcolor=INK)

    _style(scores, "micro-F1")
    draw(scores, [record["train"]["micro_f1"] for record in history], MUTED, "train")
    draw(scores, [record["valid"]["micro_f1"] for record in history], BLUE, "validation")
    if best_epoch is not None:
        value = history[best_epoch - 1]["valid"]["micro_f1"]
        label = f"chosen: epoch {best_epoch}, {value:.3f}"
        scores.plot([best_epoch], [value], "o", color=ORANGE, markersize=8, label=label)
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

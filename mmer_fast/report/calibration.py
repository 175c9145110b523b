"""Calibration: whether a label given the probability p is there in a share p of the cases.

All N K decisions of a split count together. The expected calibration error is torchmetrics'; the diagram shows the bins
that it sums over. Shapes: N samples, K labels, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from mmer_fast.report.curves import PANEL_INCHES, style_axes
from mmer_fast.report.page import Content, Html, number, table, tag
from mmer_fast.report.svg import inline_svg
from mmer_fast.report.theme import GRID, MUTED, RUN_COLOURS

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Reliability of probabilities.

    Attributes:
        counts: (B,) decisions in each of the bins, which share [0, 1] equally.
        predicted: (B,) mean probability in each; NaN in an empty one.
        observed: (B,) share of them where the label is there; NaN in an empty one.
        error: expected calibration error, mean of |predicted - observed| over the decisions.
        brier: mean squared difference of probability and label.
    """

    counts: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    error: float
    brier: float


def calibration(probabilities_nk: Tensor, labels_nk: Tensor, bins: int = BINS) -> Calibration:
    """Calibration over all decisions.

    Args:
        probabilities_nk: (N >= 1, K >= 1) floating, in [0, 1].
        labels_nk: (N, K), 0 or 1.
        bins: B, at least 1.
    """
    p, y = probabilities_nk.double().reshape(-1), labels_nk.double().reshape(-1)
    bin_of = (p * bins).floor().clamp(max=bins - 1).long().numpy()
    counts = np.bincount(bin_of, minlength=bins)
    whole = np.where(counts > 0, counts, np.nan)
    return Calibration(
        counts,
        np.bincount(bin_of, p.numpy(), minlength=bins) / whole,
        np.bincount(bin_of, y.numpy(), minlength=bins) / whole,
        float(binary_calibration_error(p, y.long(), n_bins=bins, norm="l1")),
        float((p - y).square().mean()),
    )


def calibration_block(runs: Sequence[tuple[str, Calibration | None]]) -> Html:
    """Reliability diagram and errors of runs, in the order of their colours.

    Args:
        runs: name and calibration of each; None where it is not known.
    """
    figure = Figure(figsize=(PANEL_INCHES[0] + 0.6, 3.8), layout="constrained")
    axes, histogram = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    style_axes(axes, "Reliability", "", "observed share")
    style_axes(histogram, "", "predicted probability", "share of all")
    axes.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1)
    for i, (_, result) in enumerate(runs):
        if result is not None:
            _draw(axes, histogram, result, RUN_COLOURS[i % len(RUN_COLOURS)])
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.grid(axis="x", color=GRID)
    handles = [Line2D([], [], color=MUTED, linestyle="--", linewidth=1)]
    axes.legend(handles, ["perfect"], frameon=False, labelcolor=MUTED, fontsize=9, loc="upper left")
    description = "Observed share of a label against its predicted probability"
    rows: list[list[Content]] = [
        [tag("span", name), number(result.error), number(result.brier)] for name, result in runs if result is not None
    ]
    errors = table(("run", "expected calibration error", "Brier score"), rows)
    return tag("div", tag("figure", inline_svg(figure, "calibration", description)), errors, class_="columns")


def _draw(axes: Axes, histogram: Axes, result: Calibration, colour: str) -> None:
    axes.plot(result.predicted, result.observed, "-o", color=colour, markersize=4)
    edges = np.linspace(0, 1, len(result.counts) + 1)
    histogram.stairs(result.counts / result.counts.sum(), edges, color=colour, linewidth=1.4)

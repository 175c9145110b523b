"""What the plots share: colours, axes, labels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.text import caption

OURS, INK = "#c2410c", "#22262b"


def time_label(us: float, _: Any = None) -> str:
    for limit, scale, unit in ((1e3, 1.0, "µs"), (1e6, 1e-3, "ms"), (float("inf"), 1e-6, "s")):
        if us < limit:
            return f"{digits(us * scale)} {unit}"
    raise AssertionError


def short_count(value: float) -> str:
    """A tick of an axis that counts, e.g. ``64``, ``1k``, ``50M``."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:g}"


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(heights: list[float], factor: float = 1.35) -> list[float]:
    """Heights for labels of ascending `heights` on a log axis, each at least `factor` above the one before."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] * factor) if placed else height)
    return placed


def style(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9cdd3")
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.set_axisbelow(True)


def finish(figure: Figure, title: str, result: dict[str, Any], path: Path) -> Path:
    """Titles the figure and writes it as a PNG that bears the digest of its result."""
    figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(caption(result), fontsize=7.5, color="#6b7280", x=0.99, ha="right")
    figure.savefig(path, dpi=144, facecolor="white", metadata={"Source": digest(result)})
    plt.close(figure)
    return path


def digest(result: dict[str, Any]) -> str:
    """What tells two results apart."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def source(path: Path) -> str | None:
    """The digest of the result that a PNG of `finish` shows; None where it bears none."""
    with Image.open(path) as image:
        return image.info.get("Source")

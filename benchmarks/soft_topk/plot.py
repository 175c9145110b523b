"""The plot of a result: every contestant on one case, and how time grows with the length of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks import bars, drawing
from benchmarks.drawing import INK, OURS, digits, plt, time_label
from mmer_fast.bench.harness import FORWARD, FORWARD_BACKWARD, OK
from mmer_fast.bench.soft_topk.peers import SAME_PLAN, YARDSTICK

_PLAN, _OTHER, _YARD = "#1d4e89", "#8a8f98", "#b9bec6"
_LINES = {  # contestant: colour, line style of the right panel
    "Sinkhorn-200 log, autograd": ("#1d4e89", "-"),
    "Newton, torch.compile": ("#4f86c6", "-"),
    "torch.topk": ("#6b7280", "--"),
    "torch.sigmoid": ("#a3a9b2", "--"),
}
_LENGTHS = ("64x50", "64x500", "64x5000")


def _colour(row: dict[str, Any]) -> str:
    if row["ours"]:
        return OURS
    return {SAME_PLAN: _PLAN, YARDSTICK: _YARD}.get(row["relaxation"], _OTHER)


def _methods(axes: Axes, result: dict[str, Any], case: str) -> None:
    """Bars: forward + backward; a mark: forward alone. Slowest at the top."""
    rows = [row for row in result["rows"] if row["case"] == case and row["status"] == OK]
    both = {row["contestant"]: row for row in rows if row["pass"] == FORWARD_BACKWARD}
    alone = {row["contestant"]: row for row in rows if row["pass"] == FORWARD}
    names = sorted(both, key=lambda name: both[name]["us"])
    slowest = max(row["us"] for row in both.values())
    fastest = min(row["us"] for row in (*both.values(), *(alone[n] for n in names)))
    left = fastest / 2
    for y, name in enumerate(names):
        row = both[name]
        axes.barh(y, row["us"] - left, left=left, height=0.62, color=_colour(row))
        axes.plot(alone[name]["us"], y, "o", ms=5, mfc="white", mec=INK, mew=1.1)
        times = "" if row["ours"] else f"   {digits(row['ratio'])}×"  # noqa: RUF001
        axes.text(row["us"] * 1.15, y, f"{time_label(row['us'])}{times}", va="center", fontsize=8.5, color=INK)
    axes.set_xscale("log")
    axes.set_xlim(left, slowest * 8)
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), names)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(_colour(both[name]) if both[name]["relaxation"] != YARDSTICK else "#6b7280")
        label.set_fontweight("bold" if both[name]["ours"] else "normal")
    axes.xaxis.set_major_formatter(FuncFormatter(time_label))
    axes.grid(axis="x", color="#eceef1")
    axes.set_title(
        f"{case.replace('x', ' rows of ')}, forward + backward   (○: forward alone)", loc="left", fontsize=10
    )


def _growth(axes: Axes, result: dict[str, Any]) -> None:
    """Forward + backward over the length of a row, 64 rows."""
    ours = next(row["contestant"] for row in result["rows"] if row["ours"])
    styles = {ours: (OURS, "-"), **_LINES}
    ends: dict[str, float] = {}
    for name, (colour, line) in styles.items():
        rows = [bars.find(result, case, FORWARD_BACKWARD, name) for case in _LENGTHS]
        found = [row for row in rows if row is not None]
        if found:
            times = [row["us"] for row in found]
            width, layer = (2.6, 3) if name == ours else (1.6, 2)
            axes.plot([r["n"] for r in found], times, line, color=colour, lw=width, marker="o", ms=4, zorder=layer)
            ends[name] = times[-1]
    names = sorted(ends, key=lambda name: ends[name])
    for name, height in zip(names, drawing.spread([ends[name] for name in names]), strict=True):
        weight = "bold" if name == ours else "normal"
        axes.text(6300, height, name, va="center", fontsize=8.5, color=styles[name][0], fontweight=weight)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([50, 500, 5000], ["50", "500", "5000"])
    axes.minorticks_off()
    axes.set_xlim(40, 90000)
    axes.yaxis.set_major_formatter(FuncFormatter(time_label))
    axes.grid(color="#eceef1")
    axes.set_xlabel("n, length of a row", fontsize=9, loc="left", color=INK)
    axes.set_title("64 rows of n, forward + backward", loc="left", fontsize=10)


def draw(result: dict[str, Any], case: str, path: Path) -> Path:
    """Draws a result's `case` into the PNG `path`."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.9), gridspec_kw={"width_ratios": [1.35, 1]}, layout="constrained"
    )
    for axes in (left, right):
        drawing.style(axes)
    _methods(left, result, case)
    _growth(right, result)
    title = "Soft top-k: time of a call, log scale. Blue: the same plan; grey: another function"
    return drawing.finish(figure, title, result, path)

"""What docs/scaling.md says: the growth of each sweep, and the estimate for larger problems and machines."""

from __future__ import annotations

from typing import Any

from benchmarks.scaling import estimate
from benchmarks.scaling.fit import fit, upper_half
from benchmarks.scaling.sweeps import SWEEPS, Sweep
from benchmarks.text import caption, count, microseconds, roofline
from mmer_fast.bench.harness import OK, Row


def points(result: dict[str, Any], sweep: Sweep, contestant: str) -> list[Row]:
    """The rows of a contestant, in ascending order of what grows."""
    rows = [row for row in result["rows"] if row["sweep"] == sweep.name and row["contestant"] == contestant]
    return sorted((row for row in rows if row["status"] == OK), key=lambda row: row["at"])


def measured(result: dict[str, Any]) -> list[Sweep]:
    """The sweeps of which a power law can be drawn."""
    return [sweep for sweep in SWEEPS if len(points(result, sweep, sweep.contestants[0])) >= 3]


def growth_table(result: dict[str, Any]) -> str:
    """Ours in each sweep: times at its ends, exponents, share of the roofline."""
    lines = [
        "| operator | what grows | from, to | time | exponent | of the upper half | by counting | of the roofline |",
        "|---|---|--:|--:|--:|--:|---|--:|",
    ]
    for sweep in measured(result):
        rows = points(result, sweep, sweep.contestants[0])
        xs, ys = [row["at"] for row in rows], [row["us"] for row in rows]
        ends = rows[0], rows[-1]
        cells = [
            sweep.operator,
            f"{sweep.axis}; {sweep.fixed}",
            ", ".join(count(row["at"]) for row in ends),
            ", ".join(microseconds(row["us"]) for row in ends),
            str(fit(xs, ys)),
            str(upper_half(xs, ys)),
            f"{sweep.counted:g}{sweep.remark and f': {sweep.remark}'}",
            f"{', '.join(map(roofline, ends))} ({rows[-1]['bound']})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def estimate_table(result: dict[str, Any]) -> str:
    """Times beyond the sweeps, on this machine and on larger ones."""
    titles = [f"{times}x: {estimate.ceilings(result, times)}" for times in estimate.MACHINES]
    lines = [
        f"| operator | size | bound | {' | '.join(titles)} |",
        f"|---|---|---|{'--:|' * len(titles)}",
    ]
    for sweep in measured(result):
        if sweep.beyond is None:
            continue
        rows = points(result, sweep, sweep.contestants[0])
        times = [estimate.microseconds(rows[-1], sweep, sweep.beyond, times) for times in estimate.MACHINES]
        size = f"{sweep.axis}: {count(sweep.beyond)}; {sweep.fixed}"
        lines.append(f"| {sweep.operator} | {size} | {rows[-1]['bound']} | {' | '.join(map(microseconds, times))} |")
    return "\n".join(lines)


def section(result: dict[str, Any], device: str) -> str:
    """What stands between the markers."""
    return "\n".join(
        [
            f"![Time and share of the roofline over what grows](../benchmarks/results/scaling_{device}.png)",
            "",
            "Measured: time of a call of ours, forward + backward or a cycle of the perturbation, and the power laws "
            "fitted to it:",
            "",
            growth_table(result),
            "",
            "**Estimated, not measured**: sizes beyond these, on this machine and on ones whose ceilings are 4 and 16 "
            "times as high:",
            "",
            estimate_table(result),
            "",
            caption(result),
        ]
    )

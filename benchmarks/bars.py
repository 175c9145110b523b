"""What soft top-k promises on the CPU, in ratios that a result either holds or does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.run import FORWARD, FORWARD_BACKWARD


@dataclass(frozen=True)
class Bar:
    """`contestant` takes at least `at_least` times the time of mmer_fast (1/4: ours takes at most four times its)."""

    promise: str
    case: str
    step: str
    contestant: str
    at_least: float


CPU_BARS = (
    Bar("100x faster than Sinkhorn-200", "64x500", FORWARD_BACKWARD, "Sinkhorn-200 log, autograd", 100.0),
    Bar("2x faster than compiled Newton", "64x500", FORWARD_BACKWARD, "Newton, torch.compile", 2.0),
    Bar("faster than torch.topk", "64x500", FORWARD, "torch.topk", 1.0),
    Bar("at most 4x torch.sigmoid", "64x500", FORWARD, "torch.sigmoid", 1 / 4),
    Bar("at most 3x torch.sigmoid", "4096x512", FORWARD, "torch.sigmoid", 1 / 3),
)


def find(result: dict[str, Any], case: str, step: str, contestant: str) -> dict[str, Any] | None:
    """The row of a result that was measured, or None."""
    for row in result["rows"]:
        if (row["case"], row["pass"], row["contestant"]) == (case, step, contestant) and row["status"] == "ok":
            return row
    return None


def check(result: dict[str, Any], bars: tuple[Bar, ...] = CPU_BARS) -> list[tuple[bool, str]]:
    """For each bar whether it holds, and a line with the figures; a bar that was not measured does not hold."""
    lines = []
    for bar in bars:
        row = find(result, bar.case, bar.step, bar.contestant)
        if row is None:
            lines.append((False, f"FAIL  {bar.case} {bar.step}: {bar.promise}: {bar.contestant} was not measured"))
            continue
        ratio, lowest, highest = row["ratio"], row["ratio_min"], row["ratio_max"]
        holds = ratio > bar.at_least if bar.at_least == 1.0 else ratio >= bar.at_least
        if bar.at_least < 1.0:
            found = f"{1 / ratio:.2f}x its time (turns {1 / highest:.2f} to {1 / lowest:.2f})"
        else:
            found = f"{ratio:.2f}x faster (turns {lowest:.2f} to {highest:.2f})"
        lines.append((holds, f"{'PASS' if holds else 'FAIL'}  {bar.case} {bar.step}: {bar.promise}: {found}"))
    return lines

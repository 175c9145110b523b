"""The promises of the operators on a device: how many hold, and what is known of each that does not.

A figure that falls short is listed with the time of ours and of whom it was measured against, and the share of the
roofline that each reaches: near 100 % the machine allows no more, whatever the figure asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.interface import Operator
from benchmarks.text import microseconds, roofline
from mmer_fast.bench.harness import Row

PAGE = "docs/performance.md"
NAME = "promises"  # in the markers of the page

Found = tuple[Operator, dict[str, Any]]


def section(device: str, found: Sequence[Found]) -> str:
    """What stands between the markers: a sentence, and a table of the promises that do not hold; empty without any."""
    verdicts = [
        (promise, result, promise.verdict(result)) for operator, result in found for promise in operator.bars[device]
    ]
    if not verdicts:
        return ""
    open_ones = [(promise, result, text) for promise, result, (holds, text) in verdicts if not holds]
    counted = f"{len(verdicts) - len(open_ones)} of {len(verdicts)} promises hold in the newest results."
    if not open_ones:
        return counted
    lines = [counted, "", "| does not hold | time, share of the roofline and what sets it |", "|---|---|"]
    for promise, result, text in open_ones:
        rows = promise.rows(result)
        lines.append(f"| {text} | {'; '.join(map(_accounting, rows)) if rows else 'not measured'} |")
    return "\n".join(lines)


def _accounting(row: Row) -> str:
    share = f", {roofline(row)} ({row['bound']})" if "roofline" in row else ""
    return f"{row['contestant']}: {microseconds(row['us'])}{share}"

"""What the fast step promises beside the padded textbook: time, and no more memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bars import Promise, find, measured
from benchmarks.training_step.cases import STEP
from benchmarks.training_step.contestants import BF16, EAGER, FAST, GRAPHS, SHARED, SHARED_BF16
from mmer_fast.bench.harness import Row


@dataclass(frozen=True)
class StepBar:
    """The padded textbook takes at least `at_least` times the time of the quickest of `ours`."""

    promise: str
    case: str
    ours: tuple[str, ...]
    at_least: float

    def verdict(self, result: dict[str, Any]) -> tuple[bool, str]:
        rows = self.rows(result)
        if not rows:
            return False, f"{self.case}: {self.promise}: not measured"
        own, peer = rows
        # Both ratios are to the same contestant, turn by turn.
        ratio = peer["ratio"] / own["ratio"]
        return ratio >= self.at_least, f"{self.case}: {self.promise}: {ratio:.2f}x, {own['contestant']}"

    def rows(self, result: dict[str, Any]) -> list[Row]:
        peer = find(result, self.case, STEP, EAGER)
        rows = [row for name in self.ours if (row := find(result, self.case, STEP, name)) is not None]
        return [min(rows, key=lambda row: row["ratio"]), peer] if rows and peer is not None else []


@dataclass(frozen=True)
class PeakBar:
    """A step of `contestant` holds at most what one of `peer` does."""

    case: str
    contestant: str
    peer: str

    def verdict(self, result: dict[str, Any]) -> tuple[bool, str]:
        rows = self.rows(result)
        if not rows:
            return False, f"{self.case}: peak memory of {self.contestant}: not measured"
        own, other = (row["peak_bytes"] / 2**20 for row in rows)
        return own <= other, f"{self.case}: {self.contestant} holds {own:.0f} MiB, {self.peer} {other:.0f}"

    def rows(self, result: dict[str, Any]) -> list[Row]:
        return measured(result, self.case, STEP, (self.contestant, self.peer))


_FLOAT32, _BFLOAT16 = (FAST, SHARED), (BF16, SHARED_BF16)


def _peaks(cases: Sequence[str], contestants: Sequence[str]) -> list[Promise]:
    return [PeakBar(case, name, EAGER) for case in cases for name in contestants]


CPU_BARS: tuple[Promise, ...] = (
    StepBar("3.3x in float32", "step-paper-width-dropout", _FLOAT32, 3.3),
    StepBar("5.5x in bfloat16", "step-paper-width-dropout", _BFLOAT16, 5.5),
    StepBar("5.5x in float32", "step-compact-dropout", _FLOAT32, 5.5),
    StepBar("7x in the best precision", "step-compact-dropout", _FLOAT32 + _BFLOAT16, 7.0),
    *_peaks(("step-compact", "step-paper-width"), (FAST, BF16)),
    *_peaks(("step-compact-dropout", "step-paper-width-dropout"), (*_FLOAT32, *_BFLOAT16)),
)
CUDA_BARS: tuple[Promise, ...] = (
    StepBar("5x in bfloat16", "step-paper-dropout", (*_BFLOAT16, GRAPHS), 5.0),
    *_peaks(("step-paper", "step-paper-dropout"), (FAST, BF16)),
)

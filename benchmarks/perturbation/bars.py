"""What the weight perturbation promises: times beside those who do the same, the share of the copy bandwidth, launches.

Of the foreach ways it is the one with fresh copies that the promise is about; the tables show the one with kept copies
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bars import Bar, Promise, find, measured
from mmer_fast.bench.harness import Row
from mmer_fast.bench.perturbation.cases import CYCLE
from mmer_fast.bench.perturbation.peers import CLONE_AND_SWAP, FRESH

_SIZES = ("71M", "8.4M")


@dataclass(frozen=True)
class ShareBar:
    """A cycle of `contestant` moves its 7 values an entry at `at_least` of the bandwidth of a copy."""

    promise: str
    case: str
    contestant: str
    at_least: float

    def verdict(self, result: dict[str, Any]) -> tuple[bool, str]:
        row = find(result, self.case, CYCLE, self.contestant)
        if row is None:
            return False, f"{self.case} {CYCLE}: {self.promise}: {self.contestant} was not measured"
        found = f"{100 * row['of_copy']:.0f} % ({row['gbps']:.0f} of {row['copy_gbps']:.0f} GB/s)"
        return row["of_copy"] >= self.at_least, f"{self.case} {CYCLE}: {self.promise}: {found}"

    def rows(self, result: dict[str, Any]) -> list[Row]:
        return measured(result, self.case, CYCLE, (self.contestant,))


@dataclass(frozen=True)
class LaunchBar:
    """A cycle of `contestant` launches at most `at_most` kernels, and some."""

    promise: str
    case: str
    contestant: str
    at_most: int

    def verdict(self, result: dict[str, Any]) -> tuple[bool, str]:
        row = find(result, self.case, CYCLE, self.contestant)
        if row is None or row["launches"] is None:
            return False, f"{self.case} {CYCLE}: {self.promise}: {self.contestant} was not counted"
        count = row["launches"]
        return 0 < count <= self.at_most, f"{self.case} {CYCLE}: {self.promise}: {self.contestant} launches {count}"

    def rows(self, result: dict[str, Any]) -> list[Row]:
        return measured(result, self.case, CYCLE, (self.contestant,))


def _shares(contestant: str, at_least: float) -> Sequence[Promise]:
    return [ShareBar(f"at least {100 * at_least:g} % of copy bandwidth", c, contestant, at_least) for c in _SIZES]


CPU_BARS: tuple[Promise, ...] = (
    *(Bar("1.8x faster than clone and swap", case, CYCLE, (CLONE_AND_SWAP,), 1.8) for case in _SIZES),
    *(Bar("2.5x faster than foreach copy, add, copy back", case, CYCLE, (FRESH,), 2.5) for case in _SIZES),
    *_shares("mmer_fast cpu", 0.7),
)
CUDA_BARS: tuple[Promise, ...] = (
    *_shares("mmer_fast cuda", 0.85),
    *(
        LaunchBar("3 launches", f"{case}{dtype}", f"mmer_fast {backend}", 3)
        for backend in ("cuda", "triton")
        for case in _SIZES
        for dtype in ("", "-bf16")
    ),
)

"""What an operator promises, in figures that a result either holds or does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmer_fast.bench.harness import OK, Row


class Promise(Protocol):
    @property
    def case(self) -> str: ...

    def verdict(self, result: dict[str, Any]) -> tuple[bool, str]:
        """Whether it holds, and the figures; what was not measured does not hold."""
        ...

    def rows(self, result: dict[str, Any]) -> list[Row]:
        """What the verdict is about: ours first, then who it is held against; none if either was not measured."""
        ...


@dataclass(frozen=True)
class Bar:
    """The quickest of `contestants` takes at least `at_least` times our time (1/4: ours takes at most four times its).

    Our time is that of the row's base: ours that solves the same task.
    """

    promise: str
    case: str
    step: str
    contestants: tuple[str, ...]
    at_least: float

    def verdict(self, result: dict[str, Any]) -> tuple[bool, str]:
        row = self._quickest(result)
        if row is None:
            return False, f"{self.case} {self.step}: {self.promise}: {', '.join(self.contestants)} was not measured"
        ratio, lowest, highest = row["ratio"], row["ratio_min"], row["ratio_max"]
        holds = ratio > self.at_least if self.at_least == 1.0 else ratio >= self.at_least
        if self.at_least < 1.0:
            found = f"{1 / ratio:.2f}x its time (turns {1 / highest:.2f} to {1 / lowest:.2f})"
        else:
            found = f"{ratio:.2f}x our time (turns {lowest:.2f} to {highest:.2f})"
        if len(self.contestants) > 1:
            found += f", the quickest being {row['contestant']}"
        return holds, f"{self.case} {self.step}: {self.promise}: {found}"

    def rows(self, result: dict[str, Any]) -> list[Row]:
        row = self._quickest(result)
        own = None if row is None else _base(result, row)
        return [] if row is None or own is None else [own, row]

    def _quickest(self, result: dict[str, Any]) -> Row | None:
        rows = [find(result, self.case, self.step, name) for name in self.contestants]
        return min((row for row in rows if row is not None), key=lambda row: row["ratio"], default=None)


@dataclass(frozen=True)
class MemoryBar:
    """The process that ran `case` with `contestant` never held more than `at_most` bytes."""

    promise: str
    case: str
    step: str
    contestant: str
    at_most: int

    def verdict(self, result: dict[str, Any]) -> tuple[bool, str]:
        rows = self.rows(result)
        if not rows:
            return False, f"{self.case}: {self.promise}: {self.contestant} was not measured"
        peak = rows[0]["peak_bytes"]
        return peak <= self.at_most, f"{self.case}: {self.promise}: {peak / 2**20:.0f} MiB"

    def rows(self, result: dict[str, Any]) -> list[Row]:
        return measured(result, self.case, self.step, (self.contestant,))


def measured(result: dict[str, Any], case: str, step: str, contestants: Sequence[str]) -> list[Row]:
    """The rows of all contestants, or none if one of them was not measured."""
    rows = [row for name in contestants if (row := find(result, case, step, name)) is not None]
    return rows if len(rows) == len(contestants) else []


def _base(result: dict[str, Any], row: Row) -> Row | None:
    """The row that the ratio of `row` is to: ours of its case, pass and base whose own ratio is 1."""
    alike = [own for own in result["rows"] if own["ours"] and own["status"] == OK and own.get("ratio") == 1.0]
    keys = ("case", "pass", "base")  # soft top-k has one base alone, and does not name it
    return next((own for own in alike if all(own.get(key) == row.get(key) for key in keys)), None)


def find(result: dict[str, Any], case: str, step: str, contestant: str) -> Row | None:
    """The row of a result that was measured, or None."""
    for row in result["rows"]:
        if (row["case"], row["pass"], row["contestant"]) == (case, step, contestant) and row["status"] == OK:
            return row
    return None


def check(result: dict[str, Any], promises: Iterable[Promise]) -> list[tuple[bool, str]]:
    """For each promise whether it holds, and a line with the figures."""
    verdicts = [promise.verdict(result) for promise in promises]
    return [(holds, f"{'PASS' if holds else 'FAIL'}  {line}") for holds, line in verdicts]


def of_cases(promises: Sequence[Promise], result: dict[str, Any]) -> list[Promise]:
    """The promises about cases that the result has."""
    cases = {row["case"] for row in result["rows"]}
    return [promise for promise in promises if promise.case in cases]

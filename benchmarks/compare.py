"""Whether we became slower: ``python -m benchmarks.compare``; exit code 1 where a row of ours did.

The newest result of each operator is held against the last one before it that git tracks, of the same kind of machine.
Times of two runs are not compared: machines are never as quiet twice. What is compared is how our time stands to that
of each other contestant of the same case, in the same run,

    change = median over the others of (ours / other, now) / (ours / other, before)

so that one of them that became faster with a new version says little, and ours that became slower changes all. A row
is slower where its change is above the tolerance, which comes from the spread of the rows' own turns: four standard
errors of what a change is made of, and 5 % at least. Two runs of one commit came out within 16 % of each other, and
within this tolerance. Fewer than five turns have no spread to speak of: such rows are neither judged nor judges.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import ReportError, load
from mmer_fast.bench.harness import OK, Row

LEAST = 1.05
ERRORS = 4.0
TURNS = 5
# Standard deviations of a normal distribution between its 20th and 80th percentile.
_PERCENTILES = 1.683
_RANGE = 3.5  # and between the least and the largest of some 15 turns
_MEDIAN = 1.253  # the standard error of a median is that of a mean times this
_SAME = ("cpu", "cpu_generation", "cores", "threads", "isa", "gpu")  # what makes a kind of machine

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Verdict:
    """How a row of ours changed.

    Attributes:
        key: case, pass and contestant.
        change: how many times the time that it was, beside the others; None where there is nothing to compare with.
        tolerance: how much a change may be.
        brief: whether there is something, but all of it of too few turns.
    """

    key: Key
    change: float | None
    tolerance: float = LEAST
    brief: bool = False

    @property
    def slower(self) -> bool:
        return self.change is not None and self.change > self.tolerance

    def __str__(self) -> str:
        case, step, contestant = self.key
        where = f"{case} {step}: {contestant}"
        if self.change is None:
            return f"unknown {where}: fewer than {TURNS} turns" if self.brief else f"NEW     {where}"
        word = "SLOWER" if self.slower else "FASTER" if self.change < 1 / self.tolerance else "same"
        return f"{word:6}  {where}: {self.change:.2f}x the time, beside the others (tolerance {self.tolerance:.2f})"


def kind(result: dict[str, Any]) -> tuple[Any, ...]:
    """What two results must have in common to be comparable."""
    return result["device"], *(result["machine"].get(key) for key in _SAME)


def standard_error(row: Row) -> float:
    """Of the logarithm of a row's median ratio, from the percentiles of its turns, or from their range."""
    if "ratio_p20" in row:
        deviation = math.log(row["ratio_p80"] / row["ratio_p20"]) / _PERCENTILES
    else:
        deviation = math.log(row["ratio_max"] / row["ratio_min"]) / _RANGE
    return _MEDIAN * deviation / math.sqrt(row["rounds"])


def compare(new: Iterable[Row], old: Iterable[Row]) -> list[Verdict]:
    """A verdict for each measured row of ours in `new`.

    Args:
        new, old: rows of one operator.
    """
    before, now = _by_key(old), _by_key(new)
    return [_verdict(key, now, before) for key, row in now.items() if row["ours"]]


def _by_key(rows: Iterable[Row]) -> dict[Key, Row]:
    return {(row["case"], row["pass"], row["contestant"]): row for row in rows if row["status"] == OK}


def _verdict(key: Key, now: dict[Key, Row], before: dict[Key, Row]) -> Verdict:
    changes, tolerances, brief = [], [], False
    for other, row in now.items():
        if key not in before or other not in before or other[:2] != key[:2] or row["ours"]:
            continue
        four = now[key], before[other], row, before[key]
        if min(each.get("rounds", 1) for each in four) < TURNS:  # a measurement of memory is one call
            brief = True
            continue
        changes.append(four[0]["us"] * four[1]["us"] / (four[2]["us"] * four[3]["us"]))
        tolerances.append(math.exp(ERRORS * math.hypot(*map(standard_error, four))))
    if not changes:
        return Verdict(key, None, brief=brief)
    return Verdict(key, statistics.median(changes), max(LEAST, statistics.median(tolerances)))


def tracked(folder: Path) -> set[str]:
    """The names of the result files that git tracks.

    Raises:
        ReportError: the folder is not in a git repository.
    """
    command = ["git", "-C", str(folder), "ls-files", "--", "*.json"]
    try:
        return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    except (OSError, subprocess.CalledProcessError) as error:
        raise ReportError(f"{folder} must be in a git repository: the results to compare with are tracked") from error


def pairs(
    folder: Path, include_quick: bool = False, only_new: bool = False
) -> list[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """For each operator and kind of machine: the name, the newest result, and the tracked one before it, or None.

    Results have the rows of the operator alone; one that is not quick is not held against one that is. With `only_new`
    those are left out whose newest result git tracks.
    """
    known = tracked(folder)
    found: dict[tuple[Any, ...], list[tuple[bool, dict[str, Any]]]] = {}
    for path in folder.glob("*.json"):
        result = load(path)
        if result["quick"] and not include_quick:
            continue
        for operator in dict.fromkeys(row["operator"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["operator"] == operator]
            key = operator, result["quick"], *kind(result)
            found.setdefault(key, []).append((path.name in known, result | {"rows": rows}))
    paired = []
    for (operator, *_), results in sorted(found.items(), key=lambda item: str(item[0])):
        ordered = sorted(results, key=lambda item: str(item[1]["created"]), reverse=True)
        if only_new and ordered[0][0]:
            continue
        size = _runs_of_the_newest([result for _, result in ordered])
        now = _merged([result for _, result in ordered[:size]])
        assert now is not None
        paired.append((str(operator), now, _merged([result for in_git, result in ordered[size:] if in_git])))
    return paired


def _runs_of_the_newest(results: list[dict[str, Any]]) -> int:
    """How many of the results, newest first, are one: a run may be spread over several, each with cases of its own."""
    newest, cases = results[0], {row["case"] for row in results[0]["rows"]}
    for size, result in enumerate(results[1:], 1):
        others = {row["case"] for row in result["rows"]}
        if (result["commit"], result["versions"]) != (newest["commit"], newest["versions"]) or cases & others:
            return size
        cases |= others
    return len(results)


def _merged(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of the results, newest first, with the rows of cases that only later ones have."""
    if not results:
        return None
    rows: list[Row] = []
    for result in results:
        cases = {row["case"] for row in rows}
        rows += [row for row in result["rows"] if row["case"] not in cases]
    return results[0] | {"rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--include-quick", action="store_true", help="also look at results of --quick runs")
    parser.add_argument("--new", action="store_true", help="only results that git does not track yet")
    options = parser.parse_args(arguments)
    try:
        found = pairs(options.results, options.include_quick, options.new)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    slower = 0
    for operator, new, old in found:
        where = new["machine"]["gpu"] or f"{new['machine']['cpu']}, {new['machine']['threads']} threads"
        if old is None:
            print(f"{operator}, {where}: nothing to compare {new['commit']} with")
            continue
        print(f"{operator}, {where}: {new['commit']} beside {old['commit']}")
        if new["versions"]["torch"] != old["versions"]["torch"]:
            print(f"  torch was {old['versions']['torch']}, is {new['versions']['torch']}")
        verdicts = compare(new["rows"], old["rows"])
        print("\n".join(f"  {verdict}" for verdict in verdicts))
        slower += sum(verdict.slower for verdict in verdicts)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())

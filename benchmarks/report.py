"""Tables, plots and promises from the newest results: ``python -m benchmarks.report``.

For each operator and device that has a result which is not quick: what stands in its page (README.md, docs/scaling.md)
between ``<!-- benchmark:OPERATOR:DEVICE -->`` and ``<!-- /benchmark -->`` is rewritten, results/OPERATOR_DEVICE.png
drawn, and the promises are checked; docs/performance.md lists those that do not hold. results/index.html has all of it
and every row. Exit code 1: no result, no markers in a page or, with ``--strict``, a promise that does not hold.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import bars, promises
from benchmarks.interface import Operator
from benchmarks.run import OPERATORS
from mmer_fast.bench.results import SCHEMA

ROOT = Path(__file__).resolve().parent.parent
_END = "<!-- /benchmark -->"


class ReportError(RuntimeError):
    """A result or a page is not what the report needs."""


def load(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ReportError: another schema than this code's.
    """
    result = json.loads(path.read_text())
    if result.get("schema") != SCHEMA:
        raise ReportError(f"{path.name}: expected schema {SCHEMA}, got {result.get('schema')}")
    return result


def newest(folder: Path, device: str, operator: str, include_quick: bool = False) -> dict[str, Any] | None:
    """The latest result of an operator on a device that has all cases, else the latest; None where there is none.

    With the rows of this operator alone. Cases that it lacks come from earlier runs with the same machine, versions and
    commit: a run may be spread over several, as the time limits of a GPU machine may ask for.
    """
    results = [load(path) for path in sorted(folder.glob("*.json"))]
    results = [r for r in results if r["device"] == device and (include_quick or not r["quick"])]
    for result in results:
        result["rows"] = [row for row in result["rows"] if row["operator"] == operator]
    results = sorted((r for r in results if r["rows"]), key=lambda r: r["created"], reverse=True)
    whole = [_with_earlier_cases(result, results[i + 1 :]) for i, result in enumerate(results)]
    expected = {name for each in OPERATORS if each.name == operator for name in each.cases(device)}
    complete = (result for result in whole if expected <= {row["case"] for row in result["rows"]})
    return next(complete, whole[0] if whole else None)


def _with_earlier_cases(result: dict[str, Any], earlier_ones: list[dict[str, Any]]) -> dict[str, Any]:
    rows = list(result["rows"])
    for earlier in earlier_ones:
        if _origin(earlier) == _origin(result):
            cases = {row["case"] for row in rows}
            rows += [row for row in earlier["rows"] if row["case"] not in cases]
    return {**result, "rows": rows}


def _origin(result: dict[str, Any]) -> tuple[Any, ...]:
    measured = ("copy_gbps",)
    machine = {key: value for key, value in result["machine"].items() if key not in measured}
    return machine, result["versions"], result["commit"]


def update(page: Path, operator: str, device: str, content: str) -> None:
    """Puts `content` between the markers of `operator` and `device`.

    Raises:
        ReportError: there is no such page, or the markers are missing.
    """
    if not page.is_file():
        raise ReportError(f"{page.name} does not exist")
    text, pattern = page.read_text(), _between(operator, device)
    if not pattern.search(text):
        wanted = f"{_start(operator, device)} and {_END}"
        raise ReportError(f"{page.name} must have the markers {wanted}, each on its own line, in this order")
    page.write_text(pattern.sub(lambda match: f"{match[1]}{content}\n{match[3]}", text, count=1))


def written(page: Path, operator: str, device: str) -> str | None:
    """What stands between the markers, without the last line end; None without markers."""
    found = _between(operator, device).search(page.read_text())
    return None if found is None else found[2].removesuffix("\n")


def _start(operator: str, device: str) -> str:
    return f"<!-- benchmark:{operator}:{device} -->"


def _between(operator: str, device: str) -> re.Pattern[str]:
    return re.compile(f"({re.escape(_start(operator, device))}\n)(.*?)({re.escape(_END)})", re.DOTALL)


def noise(result: dict[str, Any]) -> str | None:
    """A warning where our own turns differ by more than half: the machine was not quiet."""
    noisy = {  # one of ours speaks for a pass of a case
        f"{row['case']} {row['pass']}": f"({row['us_min']:.0f} to {row['us_max']:.0f} us)"
        for row in result["rows"]
        if row["ours"] and "us_max" in row and row["us_max"] > 1.5 * row["us_min"]
    }
    text = ", ".join(f"{where} {spread}" for where, spread in noisy.items())
    return f"noisy machine, measure again when it is quiet: {text}" if noisy else None


def report(
    operator: Operator, device: str, result: dict[str, Any], results: Path, root: Path, with_plot: bool
) -> tuple[int, int]:
    """Prints, draws and writes the report of an operator on a device.

    Returns:
        How many promises do not hold, and how many pages could not be written.
    """
    content = operator.section(result, device)
    print(f"{content}\n")
    if warning := noise(result):
        print(f"warning: {warning}")
    verdicts = bars.check(result, operator.bars[device])
    print("\n".join(line for _, line in verdicts))
    if with_plot:
        print(f"drawn: {operator.draw(result, results / f'{operator.name}_{device}.png').name}")
    return sum(not holds for holds, _ in verdicts), _put(root / operator.page, operator.name, device, content)


def _put(page: Path, name: str, device: str, content: str) -> int:
    """`update`; 1 with a message where it fails, else 0."""
    try:
        update(page, name, device, content)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with README.md and docs/")
    parser.add_argument("--include-quick", action="store_true", help="also look at results of --quick runs")
    parser.add_argument("--strict", action="store_true", help="fail where a promise does not hold")
    parser.add_argument("--no-plot", action="store_true", help="tables and promises only (no matplotlib needed)")
    options = parser.parse_args(arguments)
    try:
        found = [
            (operator, device, newest(options.results, device, operator.name, options.include_quick))
            for operator in OPERATORS
            for device in ("cpu", "cuda")
        ]
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not any(result for _, _, result in found):
        print(f"error: no results in {options.results}; run python -m benchmarks.run first", file=sys.stderr)
        return 1
    measured = [(operator, device, result) for operator, device, result in found if result is not None]
    outcomes = [report(*each, options.results, options.root, not options.no_plot) for each in measured]
    broken, wrong = (sum(counts) for counts in zip(*outcomes, strict=True))
    for device in sorted({device for _, device, _ in measured}):
        results = [(operator, result) for operator, on, result in measured if on == device]
        if content := promises.section(device, results):
            wrong += _put(options.root / promises.PAGE, promises.NAME, device, content)
    if not options.no_plot:
        from benchmarks import page

        page.write(measured, options.results / "index.html")
        print(f"written: {options.results / 'index.html'}")
    return 1 if wrong or (broken and options.strict) else 0


if __name__ == "__main__":
    sys.exit(main())

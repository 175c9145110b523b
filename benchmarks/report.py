"""Tables, plot and promises from the newest results: ``python -m benchmarks.report``.

For each device that has a full (not quick) result: the table between ``<!-- benchmark:soft_topk:DEVICE -->`` and
``<!-- /benchmark -->`` of README.md is rewritten, and results/soft_topk_DEVICE.png drawn. On the CPU the promises of
`bars` are checked. Exit code 1: no result, no markers in the README, or a promise that does not hold.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import bars, cases
from benchmarks.run import FORWARD, FORWARD_BACKWARD, SCHEMA

ROOT = Path(__file__).resolve().parent.parent
MAIN_CASE = "64x500"
_END = "<!-- /benchmark -->"


class ReportError(RuntimeError):
    """A result or the README is not what the report needs."""


def load(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ReportError: another schema than this code's.
    """
    result = json.loads(path.read_text())
    if result.get("schema") != SCHEMA:
        raise ReportError(f"{path.name}: expected schema {SCHEMA}, got {result.get('schema')}")
    return result


def newest(folder: Path, device: str, include_quick: bool = False) -> dict[str, Any] | None:
    """The latest result of a device, or None."""
    results = [load(path) for path in sorted(folder.glob("*.json"))]
    results = [r for r in results if r["device"] == device and (include_quick or not r["quick"])]
    return max(results, key=lambda r: r["created"], default=None)


def microseconds(value: float) -> str:
    """Three digits, in the unit that reads best."""
    for limit, scale, unit in ((1e3, 1.0, "µs"), (1e6, 1e-3, "ms"), (float("inf"), 1e-6, "s")):
        if value < limit:
            return f"{three_digits(value * scale)} {unit}"
    raise AssertionError


def three_digits(value: float) -> str:
    """At least three significant digits, never an exponent."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def caption(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    if machine["gpu"]:
        where = f"{machine['gpu']}, CUDA {machine['cuda']}, cold L2"
    else:
        where = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
    return f"{where}; torch {versions['torch']}; commit {result['commit']}, {result['created'][:10]}."


def methods_table(result: dict[str, Any], case: str = MAIN_CASE) -> str:
    """Every contestant on one case: times, ratios to ours, errors."""
    lines = [
        "| method | computes | forward | x ours | forward + backward | x ours | error: value / gradient |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    rows = [row for row in result["rows"] if row["case"] == case]
    for name in dict.fromkeys(row["contestant"] for row in rows):
        pair = {row["pass"]: row for row in rows if row["contestant"] == name}
        cells = []
        for step in (FORWARD, FORWARD_BACKWARD):
            row = pair[step]
            ok = row["status"] == "ok"
            cells += [
                microseconds(row["us"]) if ok else row["status"],
                three_digits(row["ratio"]) if ok else "",
            ]
        error = pair[FORWARD_BACKWARD]
        wrong = [error.get("value_error"), error.get("gradient_error")]
        cells.append(" / ".join(f"{e:.0e}" for e in wrong if e is not None))
        shown = f"**{name}**" if pair[FORWARD]["ours"] else name
        lines.append(f"| {shown} | {pair[FORWARD]['relaxation']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shapes_table(result: dict[str, Any]) -> str:
    """Ours on every case, and how many times longer the others take."""
    lines = [
        "| rows | forward | of copy bandwidth | torch.sigmoid | torch.topk | forward + backward "
        "| compiled Newton | Sinkhorn-200 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        ours = {row["pass"]: row for row in reversed(result["rows"]) if row["case"] == case and row["ours"]}
        cells = [case, microseconds(ours[FORWARD]["us"]), f"{100 * ours[FORWARD]['of_copy']:.0f} %"]
        cells += [_ratio(result, case, FORWARD, name) for name in ("torch.sigmoid", "torch.topk")]
        cells.append(microseconds(ours[FORWARD_BACKWARD]["us"]))
        peers = ("Newton, torch.compile", "Sinkhorn-200 log, autograd")
        cells += [_ratio(result, case, FORWARD_BACKWARD, name) for name in peers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(result: dict[str, Any], case: str, step: str, contestant: str) -> str:
    row = bars.find(result, case, step, contestant)
    return f"{three_digits(row['ratio'])}x" if row else "-"


def section(result: dict[str, Any], device: str) -> str:
    """What stands between the markers."""
    main = next(case for case in cases.CASES if case.name == MAIN_CASE)
    return "\n".join(
        [
            f"![Soft top-k, {main.rows} rows of {main.n}](benchmarks/results/soft_topk_{device}.png)",
            "",
            f"{main.rows} rows of {main.n}, k = {int(cases.SHARE * main.n)}, ε = {main.epsilon}, {main.dtype}:",
            "",
            methods_table(result),
            "",
            "Other shapes (k = 0.4 n); the columns of others say how many times our time they take:",
            "",
            shapes_table(result),
            "",
            caption(result),
        ]
    )


def update(text: str, device: str, content: str) -> str:
    """README text with `content` between the markers of `device`.

    Raises:
        ReportError: the markers are missing.
    """
    start = f"<!-- benchmark:soft_topk:{device} -->"
    pattern = re.compile(f"({re.escape(start)}\n).*?({re.escape(_END)})", re.DOTALL)
    if not pattern.search(text):
        raise ReportError(f"README.md must have the markers {start} and {_END}, each on its own line, in this order")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text, count=1)


def noise(result: dict[str, Any]) -> str | None:
    """A warning where our own turns differ by more than half: the machine was not quiet."""
    noisy = [
        f"{row['case']} {row['pass']} ({row['us_min']:.0f} to {row['us_max']:.0f} us)"
        for row in result["rows"]
        if row["ours"] and row["status"] == "ok" and row["us_max"] > 1.5 * row["us_min"]
    ]
    return f"noisy machine, measure again when it is quiet: {', '.join(noisy)}" if noisy else None


def report(device: str, result: dict[str, Any], results: Path, readme: Path, with_plot: bool) -> int:
    """Prints, draws and writes the report of one device; the number of things that are wrong."""
    content = section(result, device)
    print(f"{content}\n")
    if warning := noise(result):
        print(f"warning: {warning}")
    verdicts = bars.check(result) if device == "cpu" else []
    print("\n".join(line for _, line in verdicts))
    wrong = sum(not holds for holds, _ in verdicts)
    if with_plot:
        from benchmarks import plot

        print(f"drawn: {plot.draw(result, MAIN_CASE, results / f'soft_topk_{device}.png', caption(result)).name}")
    try:
        if not readme.is_file():
            raise ReportError(f"{readme.name} does not exist")
        readme.write_text(update(readme.read_text(), device, content))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        wrong += 1
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--include-quick", action="store_true", help="also look at results of --quick runs")
    parser.add_argument("--no-plot", action="store_true", help="tables and promises only (no matplotlib needed)")
    options = parser.parse_args(arguments)
    try:
        found = {d: newest(options.results, d, options.include_quick) for d in ("cpu", "cuda")}
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not any(found.values()):
        print(f"error: no results in {options.results}; run python -m benchmarks.run first", file=sys.stderr)
        return 1
    wrong = sum(
        report(device, result, options.results, options.readme, not options.no_plot)
        for device, result in found.items()
        if result is not None
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""One self-contained HTML page of the newest results: machines, ceilings, promises, figures and every row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.interface import Operator
from benchmarks.scaling.table import measured
from benchmarks.text import microseconds, three_digits
from mmer_fast._files import write_text_atomically
from mmer_fast.bench import ceilings
from mmer_fast.bench.harness import OK, Row
from mmer_fast.report.page import Content, Html, page, section, table, tag

_HEADER = ("contestant", "case, pass", "median", "20 to 80 %", "x ours", "of roofline", "bound", "memory", "error")

Found = tuple[Operator, str, dict[str, Any]]

STYLE = """
#machines td{min-width:7.5em}
details td,details th{white-space:nowrap}
details{margin:8px 0}
summary{cursor:pointer}
.held{color:var(--truth)}
"""


def write(found: Sequence[Found], path: Path) -> None:
    """Writes the page of operators, devices and their results, atomically."""
    write_text_atomically(path, document(found))


def document(found: Sequence[Found]) -> str:
    """The page."""
    parts: list[Content] = [tag("style", Html(STYLE)), _machines(found), _promises(found)]
    parts += [_operator(*each) for each in found]
    lead = (
        "Contestants are timed in turns, after their results agreed with the float64 reference; peers of soft top-k "
        "alone are timed whatever their error, which its table shows. The roofline is the least time in which the "
        "machine could move the bytes or do the arithmetic of a call."
    )
    return page("mmer_fast benchmarks", lead, *parts)


def _machines(found: Sequence[Found]) -> Html:
    rows = []
    for operator, device, result in found:
        machine = result["machine"]
        where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
        top = ceilings.in_words(result["ceilings"]) if "ceilings" in result else f"copy {machine['copy_gbps']} GB/s"
        torch = result["versions"]["torch"]
        rows.append([f"{operator.name}, {device}", where, top, torch, str(result["commit"]), result["created"][:10]])
    header = ("measured", "machine", "ceilings", "torch", "commit", "date")
    return section("Machines and their ceilings", table(header, rows, text_columns=len(header)), anchor="machines")


def _promises(found: Sequence[Found]) -> Html:
    rows = []
    for operator, device, result in found:
        for promise in operator.bars[device]:
            holds, text = promise.verdict(result)
            word = tag("span", "holds" if holds else "does not hold", class_="held" if holds else "best")
            rows.append([operator.name, text, word])
    return section("Promises", table(("operator", "promise and what was found", ""), rows, text_columns=3))


def _operator(operator: Operator, device: str, result: dict[str, Any]) -> Html:
    rows: list[Row] = result["rows"]
    sweeps = measured(result) if operator.name == "scaling" else []
    if sweeps:
        shown = tag("div", *(figures.growth(result, sweep) for sweep in sweeps), class_="panels")
    else:
        shown = figures.overview(f"{operator.name}-{device}", rows)
    name = operator.name.replace("_", " ")
    details = [_details(group, cases) for group, cases in _groups(rows)]
    return section(f"{name.capitalize()}, {device}", shown, *details, anchor=f"{operator.name}-{device}")


def _groups(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by sweep, or by case."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["sweep" if "sweep" in row else "case"], []).append(row)
    return list(groups.items())


def _details(name: str, rows: Sequence[Row]) -> Html:
    return tag("details", tag("summary", name), table(_HEADER, map(_cells, rows), text_columns=2))


def _cells(row: Row) -> list[Content]:
    name = tag("b", row["contestant"]) if row["ours"] else row["contestant"]
    where = f"{row['case']}, {row['pass']}"
    if row["status"] != OK:
        return [name, where, row["status"], *[""] * 6]
    held = row.get("peak_bytes", row.get("extra_bytes"))
    wrong = [row[key] for key in ("value_error", "gradient_error", "error") if row.get(key) is not None]
    return [
        name,
        where,
        microseconds(row["us"]),
        f"{microseconds(row['us_p20'])} to {microseconds(row['us_p80'])}" if "us_p20" in row else "",
        three_digits(row["ratio"]) if "ratio" in row else "",
        f"{100 * row['roofline']:.0f} %" if "roofline" in row else "",
        row.get("bound", ""),
        "" if held is None else f"{held / 2**20:.2f} MiB",
        f"{max(wrong):.0e}" if wrong else "",
    ]

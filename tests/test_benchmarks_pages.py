"""Generated parts are not stale: they are what the committed results give. The page of every row is self-contained."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is no part of the wheel

from benchmarks import page, promises, report
from benchmarks.interface import Operator
from benchmarks.run import OPERATORS

RESULTS = report.ROOT / "benchmarks" / "results"
SECTIONS = [(operator, device) for operator in OPERATORS for device in ("cpu", "cuda")]


@pytest.mark.parametrize(("operator", "device"), SECTIONS, ids=lambda part: getattr(part, "name", part))
def test_the_tables_are_those_of_the_newest_results(operator: Operator, device: str) -> None:
    result = report.newest(RESULTS, device, operator.name)
    expected = None if result is None else operator.section(result, device)
    found = report.written(report.ROOT / operator.page, operator.name, device)
    assert (found or None) == expected, f"{operator.page} is stale: run python -m benchmarks.report"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_promises_that_do_not_hold_are_those_of_the_newest_results(device: str) -> None:
    expected = promises.section(device, [(operator, result) for operator, on, result in _found() if on == device])
    written = report.written(report.ROOT / promises.PAGE, promises.NAME, device)
    assert (written or "") == expected, f"{promises.PAGE} is stale: run python -m benchmarks.report"


def test_the_plots_are_those_of_the_newest_results() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import drawing

    shown = {f"{operator.name}_{device}.png": drawing.digest(result) for operator, device, result in _found()}
    drawn = {path.name: drawing.source(path) for path in RESULTS.glob("*.png")}
    assert drawn == shown, "plots are stale: run python -m benchmarks.report"


def test_the_page_is_that_of_the_newest_results() -> None:
    written = (RESULTS / "index.html").read_text()
    assert written == page.document(_found()), "results/index.html is stale: run python -m benchmarks.report"


def test_every_operator_has_its_place_for_a_cpu() -> None:
    for operator in OPERATORS:
        assert report.written(report.ROOT / operator.page, operator.name, "cpu") is not None, operator.name


def _found() -> list[tuple[Operator, str, dict[str, Any]]]:
    results = [(operator, device, report.newest(RESULTS, device, operator.name)) for operator, device in SECTIONS]
    return [(operator, device, result) for operator, device, result in results if result is not None]


def test_the_page_has_every_row_and_loads_nothing() -> None:
    found = _found()
    text = page.document(found)
    assert not re.search(r"(?:src|href)=\"(?!#)|url\((?!#)|@import|<script", text)
    for operator, device, result in found:
        assert f'id="{operator.name}-{device}"' in text
        part = text.partition(f'id="{operator.name}-{device}"')[2].partition("</section>")[0]
        assert part.count("<tr>") == len(result["rows"]) + len(
            {row.get("sweep", row["case"]) for row in result["rows"]}
        )


def test_the_page_escapes_what_comes_from_results() -> None:
    operator, device, result = _found()[0]
    row = result["rows"][0] | {"case": "<b>case</b>", "contestant": "<i>name</i>", "status": "<u>status</u>"}
    text = page.document([(operator, device, result | {"rows": [row, *result["rows"]]})])
    assert "<i>name" not in text
    assert "&lt;u&gt;status" in text

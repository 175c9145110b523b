"""The published tables: whole, like their own averages, and the same on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmer_fast.systems.mmin import ABLATIONS
from mmer_fast.systems.mmin.published import CONDITIONS, IEMOCAP, MSP_IMPROV

PAGE = Path(__file__).parents[3] / "docs" / "systems" / "mmin.md"


@pytest.mark.parametrize(("results", "tolerance"), [(IEMOCAP, 0.0045), (MSP_IMPROV, 0.017)])
def test_averages_are_about_those_of_the_missing_conditions(
    results: dict[str, dict[str, tuple[float, ...]]], tolerance: float
) -> None:
    """As closely as the talk has them."""
    for metrics in results.values():
        for values in metrics.values():
            assert len(values) == len(CONDITIONS)
            assert sum(values[:6]) / 6 == pytest.approx(values[CONDITIONS.index("average")], abs=tolerance)


def test_the_page_shows_them() -> None:
    page = PAGE.read_text(encoding="utf-8").partition("## Ours")[0]
    for method, metrics in IEMOCAP.items():
        if method not in ABLATIONS:
            continue
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {method} |") and " / " in line]
        shown = [tuple(map(float, cell.split("/"))) for cell in line.split("|")[2:-1]]
        for pair, wa, ua in zip(shown, metrics["WA"], metrics["UA"], strict=True):
            assert pair == pytest.approx((wa, ua), abs=0.00051)

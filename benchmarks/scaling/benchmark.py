"""How the harness sees the sweeps: a case each, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.interface import Operator
from benchmarks.scaling import measure, sweeps, table


def _cases(device: str) -> list[str]:
    return [sweep.name for sweep in sweeps.SWEEPS] if device == "cpu" else []


def _contestants(device: str) -> list[str]:
    names = [name for sweep in sweeps.SWEEPS for name in sweep.contestants if device == "cpu"]
    return list(dict.fromkeys(names))


def _draw(result: dict[str, Any], path: Path) -> Path:
    from benchmarks.scaling import plot

    return plot.draw(result, path)


OPERATOR = Operator(
    name="scaling",
    cases=_cases,
    contestants=_contestants,
    measure=measure.measure,
    show=measure.show,
    section=table.section,
    draw=_draw,
    bars={"cpu": (), "cuda": ()},
    packages=(),
    page="docs/scaling.md",
)

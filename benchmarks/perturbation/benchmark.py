"""How the harness sees the weight perturbation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.case_table import PERTURBATION, find
from benchmarks.interface import Operator
from benchmarks.perturbation import bars, table
from mmer_fast.bench import timing
from mmer_fast.bench.harness import Row
from mmer_fast.bench.perturbation import measure, peers


def _measure(name: str, parts: list[str] | None, device: str, plan: timing.Plan) -> list[Row]:
    return measure.measure(find(PERTURBATION[device], name), peers.select(device, parts), device, plan)


def _draw(result: dict[str, Any], path: Path) -> Path:
    from benchmarks.perturbation import plot

    return plot.draw(result, path)


OPERATOR = Operator(
    name="perturbation",
    cases=lambda device: [case.name for case in PERTURBATION[device]],
    contestants=lambda device: [contestant.name for contestant in peers.select(device)],
    measure=_measure,
    show=measure.show,
    section=table.section,
    draw=_draw,
    bars={"cpu": bars.CPU_BARS, "cuda": bars.CUDA_BARS},
    packages=tuple(sorted({c.package for c in peers.CONTESTANTS if c.package})),
)

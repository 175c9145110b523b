"""How the harness sees soft top-k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.case_table import SOFT_TOPK, find
from benchmarks.interface import Operator
from benchmarks.soft_topk import bars, table
from mmer_fast.bench import timing
from mmer_fast.bench.harness import Row
from mmer_fast.bench.soft_topk import measure, peers


def _measure(name: str, parts: list[str] | None, device: str, plan: timing.Plan) -> list[Row]:
    return measure.measure(find(SOFT_TOPK[device], name), peers.select(device, parts), device, plan)


def _draw(result: dict[str, Any], path: Path) -> Path:
    from benchmarks.soft_topk import plot

    return plot.draw(result, table.MAIN_CASE, path)


OPERATOR = Operator(
    name="soft_topk",
    cases=lambda device: [case.name for case in SOFT_TOPK[device]],
    contestants=lambda device: [contestant.name for contestant in peers.select(device)],
    measure=_measure,
    show=measure.show,
    section=table.section,
    draw=_draw,
    bars={"cpu": bars.CPU_BARS, "cuda": ()},
    packages=tuple(sorted({c.package for c in peers.CONTESTANTS if c.package})),
)

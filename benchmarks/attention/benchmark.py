"""How the harness sees attention: its timed cases and, on the CPU, those of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.attention import bars, memory, table
from benchmarks.interface import Operator
from mmer_fast.bench import timing
from mmer_fast.bench.attention import cases, measure, peers
from mmer_fast.bench.harness import Row


def _cases(device: str) -> list[str]:
    timed = [case.name for case in cases.CASES if device in case.devices]
    return timed + [case.name for case in memory.CASES if device == "cpu"]


def _measure(name: str, parts: list[str] | None, device: str, plan: timing.Plan) -> list[Row]:
    contestants = peers.select(device, parts)
    for memory_case in memory.CASES:
        if memory_case.name == name:
            return memory.measure(memory_case, contestants)
    (case,) = (case for case in cases.CASES if case.name == name)
    return measure.measure(case, contestants, device, plan)


def _show(rows: list[Row]) -> None:
    if any(row["case"] == case.name for row in rows[:1] for case in memory.CASES):
        memory.show(rows)
    elif rows:
        measure.show(rows)


def _draw(result: dict[str, Any], path: Path) -> Path:
    from benchmarks.attention import plot

    return plot.draw(result, path)


OPERATOR = Operator(
    name="attention",
    cases=_cases,
    contestants=lambda device: [contestant.name for contestant in peers.select(device)],
    measure=_measure,
    show=_show,
    section=table.section,
    draw=_draw,
    bars={"cpu": bars.CPU_BARS, "cuda": bars.CUDA_BARS},
    packages=tuple(sorted({c.package for c in peers.CONTESTANTS if c.package})),
)

"""How the harness sees attention: its timed cases and, on the CPU, those of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.attention import bars, memory, table
from benchmarks.case_table import ATTENTION, ATTENTION_MEMORY, find
from benchmarks.interface import Operator
from mmer_fast.bench import timing
from mmer_fast.bench.attention import measure, peers
from mmer_fast.bench.attention.cases import Case
from mmer_fast.bench.harness import Row


def _table(device: str) -> tuple[Case | memory.MemoryCase, ...]:
    return (*ATTENTION[device], *ATTENTION_MEMORY[device])


def _measure(name: str, parts: list[str] | None, device: str, plan: timing.Plan) -> list[Row]:
    contestants = peers.select(device, parts)
    case = find(_table(device), name)
    if isinstance(case, memory.MemoryCase):
        return memory.measure(case, contestants)
    return measure.measure(case, contestants, device, plan)


def _show(rows: list[Row]) -> None:
    if rows:
        of_memory = any(rows[0]["case"] == case.name for case in ATTENTION_MEMORY["cpu"])
        (memory if of_memory else measure).show(rows)


def _draw(result: dict[str, Any], path: Path) -> Path:
    from benchmarks.attention import plot

    return plot.draw(result, path)


OPERATOR = Operator(
    name="attention",
    cases=lambda device: [case.name for case in _table(device)],
    contestants=lambda device: [contestant.name for contestant in peers.select(device)],
    measure=_measure,
    show=_show,
    section=table.section,
    draw=_draw,
    bars={"cpu": bars.CPU_BARS, "cuda": bars.CUDA_BARS},
    packages=tuple(sorted({c.package for c in peers.CONTESTANTS if c.package})),
)

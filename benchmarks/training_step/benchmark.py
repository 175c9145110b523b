"""How the harness sees the training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.case_table import TRAINING_STEP, find
from benchmarks.interface import Operator
from benchmarks.training_step import bars, contestants, measure, table
from mmer_fast.bench import timing
from mmer_fast.bench.harness import Row


def _measure(name: str, parts: list[str] | None, device: str, plan: timing.Plan) -> list[Row]:
    return measure.measure(find(TRAINING_STEP[device], name), contestants.select(device, parts), device, plan)


def _draw(result: dict[str, Any], path: Path) -> Path:
    from benchmarks.training_step import plot

    return plot.draw(result, path)


OPERATOR = Operator(
    name="training_step",
    cases=lambda device: [case.name for case in TRAINING_STEP[device]],
    contestants=lambda device: [contestant.name for contestant in contestants.select(device)],
    measure=_measure,
    show=measure.show,
    section=table.section,
    draw=_draw,
    bars={"cpu": bars.CPU_BARS, "cuda": bars.CUDA_BARS},
    packages=(),
)

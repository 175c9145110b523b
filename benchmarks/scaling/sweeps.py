"""The sweeps: cases of an operator that differ in one number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmer_fast.bench.attention.cases import Case as AttentionCase
from mmer_fast.bench.harness import FORWARD_BACKWARD
from mmer_fast.bench.perturbation.cases import CYCLE, Small
from mmer_fast.bench.perturbation.cases import Case as PerturbationCase
from mmer_fast.bench.soft_topk.cases import Case as SoftTopkCase

_SOFT_TOPK = ("mmer_fast cpu", "Newton, eager")
_ATTENTION = ("mmer_fast cpu", "SDPA, bool mask", "SDPA, no mask")
_PERTURBATION = ("mmer_fast cpu", "clone and swap")
_ENTRIES = 2**22  # of all tensors together


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one number.

    Attributes:
        name: of the sweep.
        operator: as in `mmer_fast.bench.shapes.OPERATORS`.
        axis: what grows.
        fixed: what does not.
        step: the pass that is shown.
        contestants: who takes part, the first ours.
        points: the number, ascending, and its case.
        counted: the exponent of what a call has to do, as it is counted for the roofline.
        remark: on `counted`.
        beyond: a number to estimate for, above the points; None for no estimate.
    """

    name: str
    operator: str
    axis: str
    fixed: str
    step: str
    contestants: tuple[str, ...]
    points: tuple[tuple[float, Any], ...]
    counted: float
    remark: str = ""
    beyond: float | None = None


def _points(make: Any, *values: float) -> tuple[tuple[float, Any], ...]:
    return tuple((value, make(value)) for value in values)


SWEEPS = (
    Sweep(
        "soft_topk-n", "soft_topk", "scores of a row, n", "64 rows", FORWARD_BACKWARD, _SOFT_TOPK,
        _points(lambda n: SoftTopkCase(f"64x{n}", 64, n), 64, 256, 1024, 4096, 16384, 65536),
        1, beyond=1_000_000,
    ),
    Sweep(
        "soft_topk-rows", "soft_topk", "rows, B", "500 scores each", FORWARD_BACKWARD, _SOFT_TOPK,
        _points(lambda rows: SoftTopkCase(f"{rows}x500", rows, 500), 1, 4, 16, 64, 256, 1024, 4096),
        1, beyond=100_000,
    ),
    Sweep(
        "attention-length", "attention", "length, L", "B=4, H=8, D=64, half of it padding", FORWARD_BACKWARD,
        _ATTENTION,
        _points(lambda length: AttentionCase(f"L{length}", 4, 8, 64, length), 32, 64, 128, 256, 512, 1024, 2048),
        2, remark="the pairs", beyond=16384,
    ),
    Sweep(
        "attention-batch", "attention", "samples, B", "L=150, H=8, D=64, half of it padding", FORWARD_BACKWARD,
        _ATTENTION,
        _points(lambda batch: AttentionCase(f"B{batch}", batch, 8, 64, 150), 1, 2, 4, 8, 16, 32, 64),
        1, beyond=1024,
    ),
    Sweep(
        "attention-valid", "attention", "share of valid tokens, 1 - padding", "B=16, L=256, H=8, D=64",
        FORWARD_BACKWARD, _ATTENTION,
        _points(
            lambda valid: AttentionCase(f"valid {valid:g}", 16, 8, 64, 256, padding=1 - valid),
            0.0625, 0.125, 0.25, 0.5, 0.75, 1.0,
        ),
        2, remark="the pairs, up to a half",
    ),
    Sweep(
        "perturbation-entries", "perturbation", "parameters", "in 48 tensors", CYCLE, _PERTURBATION,
        _points(
            lambda entries: PerturbationCase(f"{entries}", Small(48, entries // 48)),
            *(48 * 4**n for n in range(5, 11)),
        ),
        1, beyond=1e9,
    ),
    Sweep(
        "perturbation-tensors", "perturbation", "tensors", f"{_ENTRIES:,} parameters in all", CYCLE, _PERTURBATION,
        _points(
            lambda count: PerturbationCase(f"{count} tensors", Small(count, _ENTRIES // count)),
            1, 4, 16, 64, 256, 1024, 4096,
        ),
        0, remark="until the tensors cost more than the entries",
    ),
)  # fmt: skip

"""The case table: every case that is measured, of each operator on each device type, in the order of the pages.

What a case is, and how its inputs are drawn, stands with its class. A case of one's own takes no table:
``mmer-fast bench --op ... --case ...``. The cases of `benchmarks.scaling` differ in one number and stand in its sweeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from benchmarks.attention.memory import MemoryCase
from benchmarks.training_step.cases import Case as TrainingStep
from mmer_fast.bench.attention.cases import Case as Attention
from mmer_fast.bench.perturbation.cases import Case as Perturbation
from mmer_fast.bench.perturbation.cases import Encoder, Small
from mmer_fast.bench.soft_topk.cases import Case as SoftTopk


class Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


def find(cases: Iterable[C], name: str) -> C:
    """The case of that name.

    Raises:
        ValueError: there is none.
    """
    table = {case.name: case for case in cases}
    if name not in table:
        raise ValueError(f"the case must be one of {', '.join(table)}, got {name!r}")
    return table[name]


_SCORES = (
    SoftTopk("64x500", 64, 500),
    SoftTopk("64x50", 64, 50),
    SoftTopk("64x5000", 64, 5000),
    SoftTopk("4096x512", 4096, 512),
    SoftTopk("4x1000000", 4, 1_000_000),
    SoftTopk("64x500-ragged", 64, 500, ragged=True),
)
SOFT_TOPK: dict[str, tuple[SoftTopk, ...]] = {
    "cpu": _SCORES,
    "cuda": (
        *_SCORES,
        SoftTopk("64x500-bf16", 64, 500, dtype="bfloat16"),
        SoftTopk("4096x512-bf16", 4096, 512, dtype="bfloat16"),
        SoftTopk("32768x500", 32768, 500),
    ),
}

# Of the lengths, what the bars are about comes first.
ATTENTION: dict[str, tuple[Attention, ...]] = {
    "cpu": (
        *(Attention(f"L{n}-{dtype}", 16, 8, 64, n, dtype) for dtype in ("fp32", "bf16") for n in (500, 150, 50)),
        Attention("L500-fp32-dense", 16, 8, 64, 500, padding=0.0),
    ),
    "cuda": tuple(
        Attention(f"B64-D{width}-L{n}-{dtype}{'' if padding else '-dense'}", 64, 8, width, n, dtype, padding)
        for padding in (0.5, 0.0)
        for dtype in ("bf16", "fp32")
        for width in (64, 128)
        for n in (500, 150, 1000, 50)
    ),
}
ATTENTION_MEMORY: dict[str, tuple[MemoryCase, ...]] = {
    "cpu": tuple(MemoryCase(f"memory-L{n}", n) for n in (500, 2000, 4000, 16384)),
    "cuda": (),
}

_E_M, _LARGER = Encoder(4, 512, 1024), Encoder(10, 768, 3072)  # E^m of RobMMR in the paper's size; 71 M parameters
_PARAMETERS = (
    Perturbation("71M", _LARGER),
    Perturbation("8.4M", _E_M),
    Perturbation("71M-bf16", _LARGER, "bf16", radius=5.0),
    Perturbation("8.4M-bf16", _E_M, "bf16", radius=5.0),
    Perturbation("8.4M-fp16", _E_M, "fp16", radius=5.0),
    Perturbation("1000x512", Small(1000, 512)),
    Perturbation("71M-tensor", _LARGER, scope="tensor"),
    Perturbation("71M-adaptive", _LARGER, adaptive=True, radius=0.5),
)
PERTURBATION: dict[str, tuple[Perturbation, ...]] = {"cpu": _PARAMETERS, "cuda": _PARAMETERS}

# A CPU takes a quarter of the paper's batch. What the bars are about comes first: a slow machine that is short of time
# leaves out the rest.
TRAINING_STEP: dict[str, tuple[TrainingStep, ...]] = {
    "cpu": (
        TrainingStep("step-compact-dropout", "compact", 64, dropout=0.1),
        TrainingStep("step-paper-width-dropout", "paper", 16, dropout=0.1),
        TrainingStep("step-compact", "compact", 64),
        TrainingStep("step-paper-width", "paper", 16),
    ),
    "cuda": (
        TrainingStep("step-paper-dropout", "paper", 64, dropout=0.1),
        TrainingStep("step-paper", "paper", 64),
    ),
}

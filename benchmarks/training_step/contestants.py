"""The contestants of the training step: ours in its options, our textbook step, and plain PyTorch on padded batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from benchmarks.training_step.cases import Case, Inputs
from benchmarks.training_step.eager import EagerStep
from mmer_fast.bench import harness
from mmer_fast.data import Batch
from mmer_fast.training.algorithm1 import Algorithm1
from mmer_fast.training.fast_step import FastStep
from mmer_fast.training.graphed_step import GraphedStep

FAST, BF16 = "fast float32", "fast bfloat16"
SHARED, SHARED_BF16 = "fast float32, shared dropout", "fast bfloat16, shared dropout"
GRAPHS = "fast bfloat16, CUDA graphs"
TEXTBOOK, EAGER = "Algorithm1", "padded eager, Sinkhorn-100"


class Step(Protocol):
    def accumulate_gradients(self, batch: Batch) -> Any: ...


@dataclass(frozen=True)
class Contestant:
    """One row of the tables.

    Attributes:
        kind: makes the step from a model and a `TrainConfig`.
        changes: fields of the `TrainConfig`.
        ours: whether it is a form of `FastStep`.
        fused: whether AdamW is fused, as in our trainer.
        devices: where it runs.
        may_fail: whether it is left out, with the reason, where it raises; for what has not run on a GPU yet.
        first_steps: how many steps are unlike the later ones.
    """

    name: str
    kind: Callable[..., Step]
    changes: tuple[tuple[str, Any], ...] = ()
    ours: bool = False
    fused: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    may_fail: bool = False
    first_steps: int = 0

    @property
    def bfloat16(self) -> bool:
        return ("precision", "bfloat16") in self.changes

    def serves(self, case: Case) -> bool:
        """Dropout is shared in any case where there is none."""
        return case.dropout > 0 or ("share_dropout", True) not in self.changes

    def step(self, inputs: Inputs) -> Step:
        changes: dict[str, Any] = dict(self.changes)
        return self.kind(inputs.model, replace(inputs.config, **changes))

    def prepare(self, inputs: Inputs) -> Callable[[], None]:
        """A whole training step, with an optimizer of its own that moves nothing."""
        step = self.step(inputs)
        optimizer = torch.optim.AdamW(inputs.model.parameters(), lr=0.0, weight_decay=0.0, fused=self.fused or None)

        def call() -> None:
            optimizer.zero_grad()
            step.accumulate_gradients(inputs.batch)
            optimizer.step()

        for _ in range(self.first_steps):
            call()
        return call


_BF16, _SHARED = ("precision", "bfloat16"), ("share_dropout", True)
CONTESTANTS = (
    Contestant(FAST, FastStep, ours=True),
    Contestant(BF16, FastStep, (_BF16,), ours=True),
    Contestant(SHARED, FastStep, (_SHARED,), ours=True),
    Contestant(SHARED_BF16, FastStep, (_BF16, _SHARED), ours=True),
    Contestant(
        GRAPHS,
        GraphedStep,
        (_BF16, ("cuda_graph", True)),
        ours=True,
        devices=("cuda",),
        may_fail=True,
        first_steps=2,  # as it is, and captured
    ),
    Contestant(TEXTBOOK, Algorithm1),
    Contestant(EAGER, EagerStep, fused=False),
)


def select(device: str, names: list[str] | None = None) -> list[Contestant]:
    """The contestants; with `names`, those whose name contains one of them, and ours.

    Raises:
        ValueError: a name that fits no contestant.
    """
    there = [contestant for contestant in CONTESTANTS if device in contestant.devices]
    mine = {contestant.name for contestant in there if contestant.ours}
    chosen = harness.select([contestant.name for contestant in there], mine, {FAST}, names)
    return [contestant for contestant in there if contestant.name in chosen]

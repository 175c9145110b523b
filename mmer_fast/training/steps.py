"""The training step of a network: Algorithm 1 in one of its forms for RobMMR, one backward pass for its sisters."""

from __future__ import annotations

import warnings
from typing import Protocol

from mmer_fast.data import Batch
from mmer_fast.models import RobMMR
from mmer_fast.models.network import Network
from mmer_fast.ops.linear import has_bfloat16_products
from mmer_fast.systems.interface import SystemModel
from mmer_fast.training.algorithm1 import Algorithm1, Loss, StepResult
from mmer_fast.training.compiled import compile_stacks
from mmer_fast.training.config import TrainConfig
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.fast_step import FastStep
from mmer_fast.training.graphed_step import GraphedStep
from mmer_fast.training.loop_config import LoopConfig


class Step(Protocol):
    """Losses and gradients of one training step.

    Attributes:
        model: whose gradients they are.
        world: the processes that share each batch.
        losses: names of the entries of `StepResult.losses`; the first is "recognition".
        recognition_loss: of logits and labels (N, K), as validation reports it.
    """

    @property
    def model(self) -> Network: ...
    @property
    def world(self) -> World: ...
    @property
    def losses(self) -> tuple[str, ...]: ...
    @property
    def recognition_loss(self) -> Loss: ...

    def accumulate_gradients(self, batch: Batch, *, measure_ratio: bool = False, weight: float = 1.0) -> StepResult:
        """Set `.grad` of the parameters, which must be None or zero before; see `Algorithm1.accumulate_gradients`."""


class LossStep:
    """The step of a model that follows one loss.

    Args:
        model: whose parameters receive the gradients.
        world: the processes that share each batch.
    """

    def __init__(self, model: SystemModel, world: World = ALONE) -> None:
        self.model: Network = model
        self.world = world
        self.losses = model.loss_names
        self.recognition_loss: Loss = model.recognition_loss
        self._objective = model.objective

    def accumulate_gradients(self, batch: Batch, *, measure_ratio: bool = False, weight: float = 1.0) -> StepResult:
        """The gradients of the objective; there is no ratio to measure."""
        objective = self._objective(batch)
        (weight * objective.total).backward()
        return StepResult(objective.parts.detach(), objective.logits.detach(), None)


def chosen_step(model: Network, config: LoopConfig, world: World = ALONE) -> Step:
    """The step of a model: the form of Algorithm 1 that `TrainConfig.step` names, or that of its loss.

    Compiles the model where `TrainConfig.compile` says so; warns of bfloat16 on a CPU that has no products of it.

    Raises:
        TypeError: a RobMMR model without a `TrainConfig`, or a network of neither kind.
    """
    if isinstance(model, SystemModel):
        return LossStep(model, world)
    if isinstance(model, RobMMR) and isinstance(config, TrainConfig):
        if config.compile:
            compile_stacks(model)
        on_cpu = next(model.parameters()).device.type == "cpu"
        if config.precision == "bfloat16" and on_cpu and not has_bfloat16_products():
            warnings.warn(
                "precision='bfloat16' is some ten times slower than 'float32' on this CPU: torch has no fast products "
                "of bfloat16 for it",
                stacklevel=2,
            )
        return algorithm1_step(model, config, world)
    raise TypeError(f"expected a RobMMR with a TrainConfig, or a SystemModel; got {type(model).__name__}")


def algorithm1_step(model: RobMMR, config: TrainConfig, world: World = ALONE) -> Algorithm1:
    """The form of Algorithm 1 that `TrainConfig.step` and `cuda_graph` name; the model runs as it does.

    Raises:
        ValueError: CUDA graphs for a model that is not on a CUDA device, or several processes.
    """
    if config.cuda_graph:
        return GraphedStep(model, config, world)
    return FastStep(model, config, world) if config.step == "fast" else Algorithm1(model, config, world)

"""The fast step as CUDA graphs: its thousands of launches as one, for networks whose kernels are shorter than a launch.

A graph is bound to shapes and addresses. So batches are brought to few shapes (`StaticInputs`), and each shape has a
graph of its own: the first batch of a shape runs as it is (and so compiles and allocates what is made once), the second
is captured, from then on the graph is replayed. The graphs share their memory; the `MOST_GRAPHS` shapes that were used
last are kept.

A step that measures the gradient ratio is not replayed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmer_fast.data import Batch
from mmer_fast.models import RobMMR
from mmer_fast.training.algorithm1 import StepResult
from mmer_fast.training.config import TrainConfig
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.fast_step import FastStep
from mmer_fast.training.static_inputs import Shape, StaticInputs, shape_of

MOST_GRAPHS = 64


@dataclass
class _Graph:
    """Of the batches of one shape; `replay` is None until the second of them."""

    inputs: StaticInputs
    replay: Callable[[], None] | None = None
    result: StepResult | None = None


class GraphedStep(FastStep):
    """As `FastStep`, replayed from CUDA graphs; for models on a CUDA device in one process.

    Dropout draws other numbers than in `FastStep`, as its tensors have other shapes.

    Args:
        model, config, world: as for `FastStep`.

    Raises:
        ValueError: a model or a configuration of which no graph can be made; several processes.
    """

    def __init__(self, model: RobMMR, config: TrainConfig, world: World = ALONE) -> None:
        super().__init__(model, config, world)
        check_place(next(model.parameters()).device, world)
        self._graphs: OrderedDict[tuple[Shape, float], _Graph] = OrderedDict()
        self._pool: Any = None
        self._gradients: list[Tensor | None] = []  # of the parameters, where every graph writes them

    def accumulate_gradients(self, batch: Batch, *, measure_ratio: bool = False, weight: float = 1.0) -> StepResult:
        """As `Algorithm1.accumulate_gradients`.

        Raises:
            TrainingError: CUDA cannot capture the step.
        """
        key = shape_of(self.model, batch), weight
        graph = self._graphs.get(key)
        is_new = graph is None
        if graph is None:
            graph = self._graphs[key] = _Graph(StaticInputs(self.model, key[0], batch))
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph.inputs.load(batch)
        if measure_ratio or is_new or not self.model.training:
            result = self._accumulate(graph.inputs.batch, graph.inputs.layout, measure_ratio, weight)
            if not self._gradients:
                self._gradients = [None if p.grad is None else torch.empty_like(p.grad) for p in self._parameters()]
            return result
        if graph.replay is None:
            self._capture(graph, weight)
        return self._replayed(graph)

    def _parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def _capture(self, graph: _Graph, weight: float) -> None:
        inputs, gradients = graph.inputs, self._gradients

        def run() -> StepResult:
            for parameter, gradient in zip(self._parameters(), gradients, strict=True):
                parameter.grad = gradient
            torch._foreach_zero_([gradient for gradient in gradients if gradient is not None])
            return self._accumulate(inputs.batch, inputs.layout, False, weight)

        try:
            self._pool, graph.replay, graph.result = capture(run, self._pool)
        except RuntimeError as error:
            raise TrainingError(
                f"CUDA cannot capture this step in a graph: {error}; train with TrainConfig.cuda_graph=False"
            ) from error

    def _replayed(self, graph: _Graph) -> StepResult:
        """The next replay overwrites what the graphs hold: results and gradients are copies."""
        assert graph.replay is not None
        assert graph.result is not None
        graph.replay()
        for parameter, gradient in zip(self._parameters(), self._gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return StepResult(graph.result.losses.clone(), graph.result.logits.clone(), None)


def check_place(device: torch.device, world: World) -> None:
    """Check that graphs can be made there.

    Raises:
        ValueError: elsewhere than on a CUDA device, or by several processes.
    """
    if device.type != "cuda" or world.group is not None:
        place = f"{world.size} processes" if device.type == "cuda" else device.type
        raise ValueError(f"TrainConfig.cuda_graph must be False on {place}, got True")


def capture(run: Callable[[], StepResult], pool: Any) -> tuple[Any, Callable[[], None], StepResult]:
    """A CUDA graph of `run`, which has run before; nothing is computed.

    Args:
        run: reads and writes tensors at the same addresses each time.
        pool: of the memory that graphs share; None: a new one.

    Returns:
        The pool, what replays the graph, and the result, in memory that a replay overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # loaders pin memory meanwhile
        result = run()
    return graph.pool(), graph.replay, result

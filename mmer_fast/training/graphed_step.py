"""The fast step as CUDA graphs: its thousands of launches as one, for networks whose kernels are shorter than a launch.

A graph is bound to shapes and addresses. So batches are brought to few shapes (`StaticInputs`), and each shape has a
graph of its own: the first batch of a shape runs as it is (and so compiles and allocates what is made once), the second
is captured, from then on the graph is replayed. The graphs share their memory; the `MOST_GRAPHS` shapes that were used
last are kept. A capture waits for the device: what pays is many batches of few shapes.

A step that measures the gradient ratio is not replayed. Tested without a GPU, not yet run on one.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmer_fast.data import Batch
from mmer_fast.models import RobMMR
from mmer_fast.perturbation.stash import records_of
from mmer_fast.training.algorithm1 import StepResult
from mmer_fast.training.config import TrainConfig
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.fast_step import FastStep
from mmer_fast.training.static_inputs import Shape, StaticInputs, shape_of

MOST_GRAPHS = 64


@dataclass
class _Graph:
    """Of the batches of one shape.

    Attributes:
        inputs: what it reads.
        warm: whether such a batch has run.
        replay: None before it is captured.
        result: in memory that a replay overwrites.
        kept: other memory that it writes to.
    """

    inputs: StaticInputs
    warm: bool = False
    replay: Callable[[], None] | None = None
    result: StepResult | None = None
    kept: tuple[Any, ...] = ()


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
        device = next(model.parameters()).device
        check_place(device, world)
        self._graphs: OrderedDict[tuple[Shape, float, bool], _Graph] = OrderedDict()
        self._captures = Captures(device)
        self._gradients: list[Tensor | None] | None = None  # of the parameters, where every graph writes them

    def accumulate_gradients(self, batch: Batch, *, measure_ratio: bool = False, weight: float = 1.0) -> StepResult:
        """As `Algorithm1.accumulate_gradients`.

        Raises:
            TrainingError: CUDA cannot capture the step.
        """
        graph = self._graph_for(batch, weight)
        graph.inputs.load(batch)
        if measure_ratio:
            return self._accumulate(graph.inputs.batch, graph.inputs.layout, True, weight)
        if graph.warm:
            return self._replayed(graph, weight)
        result = self._captures.warm_up(lambda: self._run(graph.inputs, weight))
        if self._gradients is None:
            self._gradients = [p.grad for p in self.model.parameters()]
        graph.warm = True
        return self._handed_out(result)

    def _graph_for(self, batch: Batch, weight: float) -> _Graph:
        key = shape_of(self.model, batch), weight, self.model.training
        if key not in self._graphs:
            self._graphs[key] = _Graph(StaticInputs(self.model, key[0], batch))
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
                if all(graph.replay is None for graph in self._graphs.values()):
                    self._captures.forget_memory()
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _run(self, inputs: StaticInputs, weight: float) -> StepResult:
        """The step, with its gradients in `_gradients` where those are there."""
        if self._gradients is not None:
            for parameter, gradient in zip(self.model.parameters(), self._gradients, strict=True):
                parameter.grad = gradient
            torch._foreach_zero_([gradient for gradient in self._gradients if gradient is not None])
        return self._accumulate(inputs.batch, inputs.layout, False, weight)

    def _replayed(self, graph: _Graph, weight: float) -> StepResult:
        if graph.replay is None:
            graph.replay, graph.result = self._captures.capture(lambda: self._run(graph.inputs, weight))
            graph.kept = tuple(record.stash for record in records_of(self.perturbed))
        assert graph.result is not None
        graph.replay()
        return self._handed_out(graph.result)

    def _handed_out(self, result: StepResult) -> StepResult:
        """Copies of the result and, in `.grad`, of the gradients: the next step overwrites what the graphs hold."""
        assert self._gradients is not None
        for parameter, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return StepResult(result.losses.clone(), result.logits.clone(), None)


def check_place(device: torch.device, world: World) -> None:
    """Check that graphs can be made there.

    Raises:
        ValueError: elsewhere than on a CUDA device, or by several processes.
    """
    if device.type != "cuda" or world.group is not None:
        place = f"{world.size} processes" if device.type == "cuda" else device.type
        raise ValueError(f"TrainConfig.cuda_graph must be False on {place}, got True")


class Captures:
    """Makes CUDA graphs on one device, which share their memory.

    Args:
        device: of all that the graphs read and write.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def forget_memory(self) -> None:
        """Graphs made from now on share other memory: that of graphs of which none is left is gone."""
        self._pool = None

    def warm_up(self, run: Callable[[], StepResult]) -> StepResult:
        """Runs it on the stream of the captures, as PyTorch asks for: autograd remembers streams."""
        with torch.cuda.device(self._device):
            stream, around = self._own_stream(), torch.cuda.current_stream()
            stream.wait_stream(around)
            with torch.cuda.stream(stream):
                result = run()
            around.wait_stream(stream)
        return result

    def _own_stream(self) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream()
        return self._stream

    def capture(self, run: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        """A graph of `run`, which has run before (`warm_up`); nothing is computed.

        Args:
            run: reads and writes tensors at the same addresses each time.

        Returns:
            What replays the graph, and the result, in memory that a replay overwrites.

        Raises:
            TrainingError: CUDA cannot capture it.
        """
        causes: list[Exception] = []

        def recorded() -> StepResult:
            try:
                return run()
            except Exception as error:
                causes.append(error)
                raise

        with torch.cuda.device(self._device):
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            # Other threads, which load data, may pin memory meanwhile: thread_local.
            capturing = torch.cuda.graph(graph, self._pool, self._own_stream(), "thread_local")
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", "The CUDA Graph is empty")
                    with capturing:
                        result = recorded()
            except Exception as error:
                torch.cuda.set_stream(before)  # still to be done where ending the capture failed, too
                cause = (*causes, error)[0]
                raise TrainingError(
                    f"CUDA cannot capture this step in a graph ({type(cause).__name__}: {cause}); train with "
                    "TrainConfig.cuda_graph=False"
                ) from cause
            self._pool = graph.pool()
        return graph.replay, result

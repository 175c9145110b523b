"""A case of the weight perturbation, and its inputs: a list of parameters with gradients.

A cycle is what surrounds the second forward and backward pass of a training step: find the norm of the gradients, move
the weights, bring them back. The passes themselves and the step of the base optimizer are left out: everybody pays
them alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CYCLE = "cycle"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GRADIENT = 1e-3  # standard deviation of the entries of a gradient
_SAMPLE = 4096  # entries of each tensor of a sample


@dataclass(frozen=True)
class Encoder:
    """The parameters of nn.TransformerEncoder as it initialises them: 12 tensors a layer, biases 0, LayerNorm 1."""

    layers: int
    width: int
    hidden: int

    def weights(self, seed: int) -> list[Tensor]:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            layer = nn.TransformerEncoderLayer(self.width, 1, self.hidden, batch_first=True)
            encoder = nn.TransformerEncoder(layer, self.layers, enable_nested_tensor=False)
        return [parameter.detach() for parameter in encoder.parameters()]


@dataclass(frozen=True)
class Small:
    """`count` tensors of `size` entries."""

    count: int
    size: int

    def weights(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return list((0.02 * torch.randn(self.count, self.size, generator=generator)).unbind())


@dataclass(frozen=True)
class Case:
    """`model` in `dtype`, perturbed by `radius`.

    Half types round a step of the usual 0.05 away where weights are large; theirs is larger, so that a wrong step
    shows.
    """

    name: str
    model: Encoder | Small
    dtype: str = "fp32"
    scope: str = "global"
    adaptive: bool = False
    radius: float = 0.05


@dataclass(frozen=True)
class Problem:
    """Parameters of one contestant, with their `.grad`, and what it has to do with them."""

    parameters: list[Tensor]
    radius: float
    scope: str
    adaptive: bool

    @property
    def grads(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


@dataclass(frozen=True)
class Inputs:
    """A case on its device: what every contestant gets a copy of.

    Attributes:
        weights, grads: w and g, lists of tensors of the same shapes in the dtype of the case.
        radius: the length of the step.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    radius: float
    scope: str
    adaptive: bool

    @property
    def entries(self) -> int:
        return sum(w.numel() for w in self.weights)

    @property
    def bytes(self) -> int:
        return self.entries * self.weights[0].element_size()

    def problem(self) -> Problem:
        """Parameters of its own. The gradients, which are only read, are shared."""
        parameters: list[Tensor] = [nn.Parameter(w.clone()) for w in self.weights]
        for parameter, grad in zip(parameters, self.grads, strict=True):
            parameter.grad = grad
        return Problem(parameters, self.radius, self.scope, self.adaptive)

    def sample(self) -> Inputs:
        """The first entries of each tensor, and the radius with which they make steps of the same size."""

        def heads(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.flatten()[:_SAMPLE].clone() for tensor in tensors]

        weights = heads(self.weights)
        share = sum(w.numel() for w in weights) / self.entries
        return Inputs(weights, heads(self.grads), self.radius * math.sqrt(share), self.scope, self.adaptive)


def build(case: Case, device: str, seed: int = 0) -> Inputs:
    """The inputs of `case`: drawn on the CPU, so that every device gets the same numbers."""
    dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = case.model.weights(seed)
    grads = [(_GRADIENT * torch.randn(w.shape, generator=generator)).to(device, dtype) for w in drawn]
    weights = [w.to(device, dtype) for w in drawn]
    return Inputs(weights, grads, case.radius, case.scope, case.adaptive)


def changed(before: Sequence[Tensor], after: Sequence[Tensor]) -> int:
    """How many entries have other bits."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[before[0].element_size()]
    pairs = zip(before, after, strict=True)
    return sum(int(torch.count_nonzero(a.detach().view(bits) != b.detach().view(bits))) for a, b in pairs)

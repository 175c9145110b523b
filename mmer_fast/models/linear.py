"""The linear layer of the models: that of torch, by the faster of its matrix products; and several layers as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmer_fast.ops.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `mmer_fast.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) to (N, H)."""
        return linear(x, self.weight, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """The same, for who adds the bias himself."""
        return linear(x, self.weight)


def joint_parameters(layers: Sequence[Linear]) -> tuple[Tensor, Tensor]:
    """Weight (sum of H, D) and bias (sum of H,) of one layer whose output is that of `layers` (D to H) side by side."""
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def joint_linear(x: Tensor, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    """Each layer's output of one input, by one matrix product.

    That reads `x` once instead of once for each layer, and its gradient arrives as one product instead of a sum of
    several. The outputs are slices of one tensor.

    Args:
        x: (N, D), floating.
        layers: of D inputs each, with a bias.

    Returns:
        (N, H) for each layer, H its width.
    """
    weight, bias = joint_parameters(layers)
    return linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)

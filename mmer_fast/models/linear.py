"""The linear layer of the models: that of torch, by the faster of its matrix products."""

from __future__ import annotations

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

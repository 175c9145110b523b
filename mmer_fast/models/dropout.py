"""Dropout of the models: `mmer_fast.ops.dropout`, whose masks are cheap to draw on a CPU and never stored.

The generator is torch's, so `torch.manual_seed` governs it as usual.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmer_fast.ops.dropout import dropout


class Dropout(nn.Module):
    """Inverted dropout: in training, each element is 0 with probability `p`, else divided by the share kept.

    Args:
        p: in [0, 1). On a CPU it is rounded to a multiple of 2⁻¹⁶.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def rate(self) -> float:
        """`p` in training, 0 in evaluation."""
        return self.p if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`, any."""
        return dropout(x, self.rate)

    def extra_repr(self) -> str:
        return f"p={self.p}"

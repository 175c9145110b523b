"""Dropout whose masks are cheap to draw on a CPU.

torch draws one number an element there, serially; in a small network that is a quarter of a training step.
Here one 64-bit draw decides four elements, 16 bits each. The generator is torch's, so `torch.manual_seed`
governs it as usual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEPS = 1 << 16


class Dropout(nn.Module):
    """Inverted dropout: in training, each element is 0 with probability `p`, else divided by the share kept.

    Args:
        p: in [0, 1). On a CPU it is rounded to a multiple of 2⁻¹⁶.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`, any."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped = round(self.p * _STEPS)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _STEPS // 2
        return x * kept.to(x.dtype).mul_(_STEPS / (_STEPS - dropped))

    def extra_repr(self) -> str:
        return f"p={self.p}"

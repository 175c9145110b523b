"""The loss of imagination; that of recognition is `Network.recognition_loss`.

Shape suffixes: r rows, d width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def imagination_loss(target_rd: Tensor, imagined_rd: Tensor, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """The mean over the R rows of ‖ĥ - h'‖², L_forward and L_backward of the talk.

    Args:
        target_rd: (R, D).
        imagined_rd: (R, D).
        reduction: "sum" is the squared norm, "mean" divides it by D (the published code).

    Returns:
        A scalar; 0 where R is 0.
    """
    squares_rd = (target_rd - imagined_rd).square()
    squares_r = squares_rd.sum(dim=1) if reduction == "sum" else squares_rd.mean(dim=1)
    return squares_r.sum() / max(len(squares_r), 1)

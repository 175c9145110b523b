"""Which labels exchange messages: those that occur together often enough in the training data.

Shapes: N samples, K labels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def label_graph(labels: Tensor, threshold: float = 0.2) -> Tensor:
    """The label graph of HHMPN's published code.

        A_ij = [C_ij / sqrt(n_i n_j) + I_ij >= threshold],   C = Yᵀ Y,   n_i = C_ii

    A label without any sample (n_i = 0) has no neighbour but itself.

    Args:
        labels: Y, (N, K), any dtype, 0 and 1.
        threshold: in [0, 1].

    Returns:
        (K, K) bool, symmetric, True on the diagonal.

    Raises:
        ValueError: labels that are no matrix, a threshold outside [0, 1].

    Examples:
        >>> label_graph(torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1]]), 0.5).int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    if labels.dim() != 2:
        raise ValueError(f"labels must have shape (N, K), got {tuple(labels.shape)}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    y_nk = labels.double()
    together_kk = y_nk.T @ y_nk
    counts_k = together_kk.diagonal()
    scale_kk = (counts_k[:, None] * counts_k).sqrt()
    affinity_kk = torch.where(scale_kk > 0, together_kk / scale_kk.clamp(min=1), 0.0)
    return affinity_kk + torch.eye(len(counts_k), dtype=torch.float64, device=labels.device) >= threshold

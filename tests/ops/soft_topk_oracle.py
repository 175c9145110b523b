"""An independent float64 soft top-k in NumPy, by bisection on the threshold, and the matrix form of Sinkhorn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _sigmoid(t: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(t))
    return np.where(t >= 0, 1 / (1 + e), e / (1 + e))


def soft_topk_row(scores: np.ndarray, k: float, tau: float, largest: bool = True) -> np.ndarray:
    """T of one row without padding; 0 < k < n and finite scores."""
    s = scores.astype(np.float64) * (1 if largest else -1)
    pivot = np.sort(s)[::-1][min(int(np.ceil(k)), len(s)) - 1]  # keeps the differences exact
    z = (s - pivot) / tau
    logit = np.log(k) - np.log(len(s) - k)
    low, high = logit - z.max(), logit - z.min()
    for _ in range(300):
        middle = 0.5 * (low + high)
        if _sigmoid(z + middle).sum() > k:
            high = middle
        else:
            low = middle
    return _sigmoid(z + 0.5 * (low + high))


def soft_topk(
    scores: Tensor,
    k: float | Tensor,
    epsilon: float | Tensor = 0.1,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    largest: bool = True,
) -> Tensor:
    """`soft_topk_row` over the rows of a (R, n) tensor; float64."""
    rows, n = scores.shape
    out = torch.zeros(rows, n, dtype=torch.float64)
    for i in range(rows):
        valid = torch.ones(n, dtype=torch.bool)
        if lengths is not None:
            valid = torch.arange(n) < lengths[i].cpu()
        if mask is not None:
            valid = mask[i].cpu()
        k_i = float(k[i]) if isinstance(k, Tensor) else float(k)
        tau = (float(epsilon[i]) if isinstance(epsilon, Tensor) else epsilon) / 2
        count = int(valid.sum())
        if k_i <= 0 or count == 0:
            continue
        values = scores[i].detach().cpu().double()[valid].numpy()
        solution = np.ones(count) if k_i >= count else soft_topk_row(values, k_i, tau, largest)
        out[i, valid] = torch.from_numpy(solution)
    return out


def matrix_sinkhorn(scores: Tensor, k: float, epsilon: float, iterations: int, anchor: int, normalize: bool) -> Tensor:
    """n Gamma[:, anchor] after N iterations of the published operator, in its matrix form and exponential domain.

    Anchors 0 and 1, C = (s - anchor)^2 (divided by its maximum over the batch if `normalize`), mu = 1/n, and the
    share k/n on `anchor`; starting from v = (1/2, 1/2).
    """
    rows, n = scores.shape
    cost = torch.stack([scores**2, (scores - 1) ** 2], -1)  # (R, n, 2)
    if normalize:
        cost = cost / cost.max()
    kernel = torch.exp(-cost / epsilon)
    mu = torch.full((rows, n), 1 / n, dtype=scores.dtype)
    share = torch.tensor([(n - k) / n, k / n] if anchor == 1 else [k / n, (n - k) / n], dtype=scores.dtype)
    v = torch.full((rows, 2), 0.5, dtype=scores.dtype)
    for _ in range(iterations):
        u = mu / (kernel * v[:, None, :]).sum(-1)
        v = share / (kernel * u[:, :, None]).sum(1)
    gamma = u[:, :, None] * kernel * v[:, None, :]
    return n * gamma[:, :, anchor]

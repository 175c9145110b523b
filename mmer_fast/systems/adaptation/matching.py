"""Distances between distributions that are given by samples, and between those of modalities.

They look at no labels and at no pairs of samples, so they can be minimised on whatever is unlabelled. Samples may be
left out by a mask, whatever they hold; a distribution without samples is at distance 0 from every other.

Shape suffixes: n and m samples, b batch, k modalities, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor


def maximum_mean_discrepancy(
    x_nd: Tensor,
    y_md: Tensor,
    x_valid_n: Tensor | None = None,
    y_valid_m: Tensor | None = None,
    *,
    bandwidths: Sequence[float] = (0.5, 1.0, 2.0),
) -> Tensor:
    """MMD² of two samples, the biased estimate (Gretton et al., 2012), which is at least 0:

        E k(x, x') + E k(y, y') - 2 E k(x, y),   k(a, b) = mean over s of exp(-‖a - b‖² / (s σ²))

    σ² is the mean squared distance of all pairs of both samples together, without gradient.

    Args:
        x_nd: (N, D) floating.
        y_md: (M, D).
        x_valid_n: (N,) bool, the samples that count; None: all.
        y_valid_m: (M,) bool.
        bandwidths: s.

    Returns:
        A scalar.
    """
    (x_nd, p_n), (y_md, q_m) = _counted(x_nd, x_valid_n), _counted(y_md, y_valid_m)
    both_d = torch.cat([x_nd, y_md])
    squares = (both_d[:, None] - both_d).square().sum(dim=2)
    signs = torch.cat([p_n, -q_m])
    joint = signs.abs() / signs.abs().sum().clamp(min=1)
    variance = (joint @ squares.detach() @ joint).clamp(min=torch.finfo(squares.dtype).tiny)
    kernels = torch.stack([(-squares / (s * variance)).exp() for s in bandwidths]).mean(dim=0)
    return (signs @ kernels @ signs) * _both(p_n, q_m)


def moment_discrepancy(
    x_nd: Tensor,
    y_md: Tensor,
    x_valid_n: Tensor | None = None,
    y_valid_m: Tensor | None = None,
    *,
    moments: int = 5,
    span: float = 2.0,
) -> Tensor:
    """Central moment discrepancy (Zellinger et al., 2017) of two samples, with c_k the central moments of each feature:

        ‖E x - E y‖ / |b - a|  +  Σ_{k=2..K} ‖c_k(x) - c_k(y)‖ / |b - a|^k

    Args:
        x_nd: (N, D) floating, in an interval [a, b].
        y_md: (M, D).
        x_valid_n: (N,) bool, the samples that count; None: all.
        y_valid_m: (M,) bool.
        moments: K, at least 1.
        span: |b - a|; 2 for tanh.

    Returns:
        A scalar.
    """
    (x_nd, p_n), (y_md, q_m) = _counted(x_nd, x_valid_n), _counted(y_md, y_valid_m)
    mean_x, mean_y = p_n @ x_nd, q_m @ y_md
    centred_x, centred_y = x_nd - mean_x, y_md - mean_y
    distance = torch.linalg.vector_norm(mean_x - mean_y) / span
    for k in range(2, moments + 1):
        difference_d = p_n @ centred_x**k - q_m @ centred_y**k
        distance = distance + torch.linalg.vector_norm(difference_d) / span**k
    return distance * _both(p_n, q_m)


def cross_modal_matching(
    embeddings_bkd: Tensor, present_bk: Tensor, distance: Callable[..., Tensor] = maximum_mean_discrepancy
) -> Tensor:
    """The mean over pairs of modalities of the distance between the distributions of their embeddings.

    Args:
        embeddings_bkd: (B, K, D), one of each modality.
        present_bk: (B, K) bool; embeddings of missing modalities do not count.
        distance: `maximum_mean_discrepancy` or `moment_discrepancy`.

    Returns:
        A scalar; 0 for one modality.
    """
    pairs = list(combinations(range(embeddings_bkd.shape[1]), 2))
    distances = [
        distance(embeddings_bkd[:, i], embeddings_bkd[:, j], present_bk[:, i], present_bk[:, j]) for i, j in pairs
    ]
    return torch.stack(distances).mean() if distances else embeddings_bkd.new_zeros(())


def _counted(x_nd: Tensor, valid_n: Tensor | None) -> tuple[Tensor, Tensor]:
    """The samples, 0 in place of those that do not count, and their weights (N,): 1/n for each of the n that do."""
    if valid_n is None:
        return x_nd, x_nd.new_full((len(x_nd),), 1 / max(len(x_nd), 1))
    return x_nd.masked_fill(~valid_n[:, None], 0.0), valid_n.to(x_nd.dtype) / valid_n.sum().clamp(min=1)


def _both(p_n: Tensor, q_m: Tensor) -> Tensor:
    """Bool scalar: whether both samples have something that counts."""
    return (p_n.sum() > 0) & (q_m.sum() > 0)

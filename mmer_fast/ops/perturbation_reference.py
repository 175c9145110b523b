"""Reference backend of the weight perturbation: PyTorch written for reading, float64 inside, any device and strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GLOBAL, TENSOR, AWP = 0, 1, 2
"""The scopes, as the operators' schemas number them (kernels/common/perturbation_args.h)."""


def norm(x: Tensor, dim: int | None = None) -> Tensor:
    """|x|_2, float64, without overflow or underflow; not finite where an entry is not.

    Args:
        dim: 0, the dimension to reduce; None: all of them.
    """
    x = x.to(torch.float64)
    if x.numel() == 0:
        return x.new_zeros(() if dim is None else x.shape[1:])
    largest = x.abs().amax(() if dim is None else dim)
    divisor = torch.where(largest.isfinite() & (largest > 0), largest, torch.ones_like(largest))
    return divisor * torch.linalg.vector_norm(x / divisor, dim=dim)


def grad_norm(grads: Sequence[Tensor], params: Sequence[Tensor], scope: int, adaptive: bool) -> tuple[Tensor, Tensor]:
    """|u|_2 of each group, and |w|_2 of each tensor (scope awp, else (0,)); u = g, adaptive: |w| g. float64."""
    measured = [w.to(torch.float64).abs() * g for w, g in zip(params, grads, strict=True)] if adaptive else grads
    norms = torch.stack([norm(u) for u in measured])
    if scope == GLOBAL:
        norms = norm(norms).reshape(1)
    weight_norms = torch.stack([norm(w) for w in params]) if scope == AWP else norms.new_empty(0)
    return norms, weight_norms


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    stash: Sequence[Tensor],
    norms: Tensor | None,
    weight_norms: Tensor | None,
    radius: float,
    scope: int,
    adaptive: bool,
) -> tuple[Tensor, Tensor]:
    """stash = w and w += factor d for every tensor; returns the norms and the factors of the groups.

    d = g and factor = radius/norm; adaptive: d = w^2 g; scope awp: factor = radius |w|_2/norm. Where a norm is 0 or not
    finite the factor is 0 and w keeps its bits.
    """
    if norms is None:
        norms, weight_norms = grad_norm(grads, params, scope, adaptive)
    reach = torch.full_like(norms, radius) if scope != AWP or weight_norms is None else radius * weight_norms
    moves = norms.isfinite() & (norms > 0) & reach.isfinite() & (reach > 0)
    divisor = torch.where(moves, norms, torch.ones_like(norms))

    moved = []
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        group = 0 if scope == GLOBAL else i
        wide, direction = w.to(torch.float64), g.to(torch.float64)
        if adaptive:
            direction = wide.abs() * direction / divisor[group] * wide.abs()
        else:
            direction = direction / divisor[group]
        moved.append(torch.where(moves[group], (wide + reach[group] * direction).to(w.dtype), w))
    for kept, w in zip(stash, params, strict=True):
        kept.copy_(w)
    try:
        for w, new in zip(params, moved, strict=True):
            w.copy_(new)
    except BaseException:  # an interrupt between two tensors: all or nothing
        restore_(params, stash)
        raise
    return norms.clone(), torch.where(moves, reach / divisor, torch.zeros_like(norms))


def restore_(params: Sequence[Tensor], stash: Sequence[Tensor]) -> None:
    """w = stash, bit for bit."""
    for w, kept in zip(params, stash, strict=True):
        w.copy_(kept)

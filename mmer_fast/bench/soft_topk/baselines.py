"""The same plan in pure PyTorch: Newton on the one unknown, and Sinkhorn on the (rows, n, 2) matrix.

Every function is ``(scores (R, n), k, epsilon, lengths) -> weights (R, n)`` in the dtype of the scores, computed in
float32 or wider; `k` is an int or (R,) and `lengths` is (R,) or None. They are as fast as plain PyTorch makes them: the
implicit backward is the closed form, which needs the weights alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

NEWTON_SWEEPS = 6
SINKHORN_ITERATIONS = 200


def _valid(scores: Tensor, lengths: Tensor | None) -> Tensor | None:
    if lengths is None:
        return None
    return torch.arange(scores.shape[-1], device=scores.device) < lengths[:, None]


def _wide(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores


class _ImplicitBackward(torch.autograd.Function):
    """dL/ds_i = w_i (g_i - gbar)/tau with w = T (1 - T), gbar = sum w g / sum w."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        grad, t = _wide(grads[0]), _wide(weights)
        w = t * (1 - t)
        mean = (w * grad).sum(-1, keepdim=True) / w.sum(-1, keepdim=True)
        return (w * (grad - mean) * (2 / ctx.epsilon)).to(weights.dtype), None, None, None


class _Newton(_ImplicitBackward):
    """c <- c - (logit(S/n) - logit(k/n)) S (n - S) / (n W): six sweeps, no guard."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
        z = _wide(scores) * (2 / epsilon)
        valid = _valid(scores, lengths)
        target: float | Tensor
        if lengths is None or valid is None or not isinstance(k, Tensor):
            n: int | Tensor = scores.shape[-1]
            target = math.log(k / (scores.shape[-1] - k))
            c = target - z.mean(-1, keepdim=True)
        else:
            n, k_r1 = lengths[:, None].to(z.dtype), k[:, None].to(z.dtype)
            target = torch.log(k_r1 / (n - k_r1))
            c = target - z.masked_fill(~valid, 0.0).sum(-1, keepdim=True) / n
            z = z.masked_fill(~valid, -torch.inf)
        for _ in range(NEWTON_SWEEPS):
            t = torch.sigmoid(z + c)
            total = t.sum(-1, keepdim=True)
            slope = (t * (1 - t)).sum(-1, keepdim=True)
            share = total / n
            c = c - (torch.logit(share) - target) * total * (1 - share) / slope
        weights = torch.sigmoid(z + c).to(scores.dtype)
        ctx.save_for_backward(weights)
        ctx.epsilon = epsilon
        return weights


def newton(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
    """Six Newton sweeps on logit(mean sigma(z + c)) = logit(k/n), implicit backward."""
    return _Newton.apply(scores, k, epsilon, lengths)


def problem(scores: Tensor, k: int | Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | int]:
    """The transport problem of Xie et al. 2020, section 3, as a general solver wants it.

    Returns:
        Cost (R, n, 2) to the anchors 0 and 1; marginals a (R, n), 0 on padding, and b (R, 2); n, or (R, 1) lengths.
    """
    s = _wide(scores)
    if lengths is None or not isinstance(k, Tensor):
        n: Tensor | int = s.shape[-1]
        a = torch.full_like(s, 1 / s.shape[-1])
        b = torch.tensor([1 - k / n, k / n], dtype=s.dtype, device=s.device).expand(s.shape[0], 2)
    else:
        n = lengths[:, None].to(s.dtype)
        valid = torch.arange(s.shape[-1], device=s.device) < lengths[:, None]
        s = s.masked_fill(~valid, 0.0)
        a = valid / n
        share = k[:, None].to(s.dtype) / n
        b = torch.cat([1 - share, share], -1)
    cost = torch.stack([s.square(), (s - 1).square()], -1)
    return cost, a, b, n


def sinkhorn_log(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
    """200 log-domain Sinkhorn iterations; autograd walks back through all of them."""
    cost, a, b, n = problem(scores, k, lengths)
    log_kernel, log_a, log_b = -cost / epsilon, a.log(), b.log()
    g = torch.zeros_like(log_b)
    for _ in range(SINKHORN_ITERATIONS):
        f = log_a - torch.logsumexp(log_kernel + g[:, None, :], -1)
        g = log_b - torch.logsumexp(log_kernel + f[:, :, None], -2)
    return ((f + g[:, 1:] + log_kernel[..., 1]).exp() * n).to(scores.dtype)


def sinkhorn_exp(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
    """200 Sinkhorn iterations on exp(-C/epsilon): quicker, and NaN where epsilon is small."""
    cost, a, b, n = problem(scores, k, lengths)
    kernel = (-cost / epsilon).exp()
    u, v = scalings(kernel, a, b, SINKHORN_ITERATIONS)
    return (u * v[:, 1:] * kernel[..., 1] * n).to(scores.dtype)


def scalings(kernel: Tensor, a: Tensor, b: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """u (R, n) and v (R, 2) after Sinkhorn iterations: the plan is ``u_i kernel_ij v_j``, with marginals a and b."""
    v = torch.ones_like(b)
    for _ in range(iterations):
        u = a / torch.matmul(kernel, v[:, :, None]).squeeze(-1)
        v = b / torch.matmul(u[:, None, :], kernel).squeeze(-2)
    return u, v


class _SinkhornImplicit(_ImplicitBackward):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None, solve: Any
    ) -> Tensor:
        weights = solve(scores, k, epsilon, lengths)
        ctx.save_for_backward(weights)
        ctx.epsilon = epsilon
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_ImplicitBackward.backward(ctx, *grads), None)


def sinkhorn_log_implicit(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
    """`sinkhorn_log` with the implicit backward, as in Xie et al. 2020, section 4."""
    return _SinkhornImplicit.apply(scores, k, epsilon, lengths, sinkhorn_log)


def sinkhorn_exp_implicit(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
    """`sinkhorn_exp` with the implicit backward."""
    return _SinkhornImplicit.apply(scores, k, epsilon, lengths, sinkhorn_exp)

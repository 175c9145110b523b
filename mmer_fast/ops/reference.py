"""Reference backends: PyTorch written for reading, float64 inside, any device.

They define what the compiled backends must return, and serve where nothing else can.

Legend: R rows, n entries of a row (padded); s scores, x = sign * s, tau temperature, lambda threshold, c offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmer_fast.ops.lengths import length_mask

_MAX_SWEEPS = 200  # bisection of float64 to rounding level needs about 70
_SATURATED = 800.0  # so many tau from a score its weight is 0 or 1 exactly


def valid_entries(scores: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """(..., n) bool: the entries inside `lengths` (...) or `mask` (..., n); all of them without either."""
    if lengths is not None:
        return length_mask(lengths, scores.shape[-1])
    if mask is not None:
        return mask
    return torch.ones_like(scores, dtype=torch.bool)


def _per_row(value: Tensor | None, number: float, scores: Tensor) -> Tensor:
    if value is None:
        return torch.full((scores.shape[0],), number, dtype=torch.float64, device=scores.device)
    return value.to(torch.float64)


def _solve(x: Tensor, finite: Tensor, k: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pivot p and c of sum_i sigma((x_i - p)/tau + c) = k, and the sweeps taken; each (R,).

    The pivot is the ceil(k)-th largest score, so that x - p is exact where it matters. From there, or from the middle
    of the gap where k is the place of a gap, Newton on logit(mean sigma) - logit(k/n), inside a bracket that bisection
    shrinks whenever Newton leaves it.
    """
    count = finite.sum(-1).to(torch.float64)
    order = x.masked_fill(~finite, -torch.inf).sort(dim=-1, descending=True).values
    rank = (k.ceil().long() - 1).clamp(0, max(x.shape[-1] - 1, 0))
    pivot = order.gather(-1, rank[:, None]).squeeze(-1)
    z = ((x - pivot[:, None]) / tau[:, None]).masked_fill(~finite, -torch.inf)
    z_high = z.masked_fill(~finite, torch.inf)
    target = k.log() - (count - k).log()
    low, high = target - z.amax(-1), target - z_high.amin(-1)
    gap = -z.masked_fill(z >= 0, -torch.inf).amax(-1)
    c = torch.where(k == (z >= 0).sum(-1), (0.5 * gap).clamp(max=_SATURATED), 0.0).clamp(low, high)
    sweeps = torch.full_like(k, 2.0)
    active = torch.ones_like(k, dtype=torch.bool)
    for _ in range(_MAX_SWEEPS):
        t = z + c[:, None]
        taken, left = torch.sigmoid(t), torch.sigmoid(-t) * finite
        total, slope = taken.sum(-1), (taken * left).sum(-1)
        residual = total - k
        high = torch.where(residual >= 0, torch.minimum(high, c), high)
        low = torch.where(residual <= 0, torch.maximum(low, c), low)
        logit = total.log() - left.sum(-1).log()
        newton = c - (logit - target) * total * left.sum(-1) / (count * slope)
        inside = torch.isfinite(newton) & (newton >= low) & (newton <= high)
        # A Newton step is kept only where the bracket shows that it is not a crawl along a saturated tail.
        step = torch.where(inside & ((newton - c).abs() <= 0.5 * (high - low)), newton, 0.5 * (low + high))
        sweeps = sweeps + active
        resolution = 4 * torch.finfo(torch.float64).eps * c.abs().clamp(min=1.0)
        done = (residual.abs() <= 1e-15 * k) | ((step - c).abs() <= resolution) | ((high - low) <= resolution)
        active = active & ~done
        if not bool(active.any()):
            break
        c = torch.where(active, step, c)
    return pivot, c, sweeps


def _sinkhorn(x: Tensor, finite: Tensor, k: Tensor, tau: Tensor, sign: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Offset c_{N-1} (R,) and the factor k / S_{N-1} (R,) of the output after N iterations, pivot sign/2.

    c_{t+1} = c_t + logit(k/n) - logit(S_t/n), in the log domain.
    """
    z = ((x - 0.5 * sign) / tau[:, None]).masked_fill(~finite, -torch.inf)
    count = finite.sum(-1).to(torch.float64)
    target = k.log() - (count - k).log()
    c = torch.zeros_like(k)
    for iteration in range(iterations):
        t = z + c[:, None]
        log_taken = torch.nn.functional.logsigmoid(t).logsumexp(-1)
        if iteration == iterations - 1:
            break
        log_left = torch.nn.functional.logsigmoid(-t).masked_fill(~finite, -torch.inf).logsumexp(-1)
        c = c + target - log_taken + log_left
    return c, (k.log() - log_taken).exp()


def soft_topk_forward(
    scores: Tensor,
    k: Tensor | None,
    k_value: float,
    tau: Tensor | None,
    tau_value: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    largest: bool,
    sinkhorn_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """T_i = sigma(sign (s_i - lambda)/tau), sum T = k: RobMMR Eq. 8-9 reduced to one unknown a row.

    Args:
        scores: (R, n), floating point.
        k, tau: (R,) float64, or None for the number beside it.
        lengths, mask: (R,) int64 or (R, n) bool, or None.
        sinkhorn_iterations: 0 for the fixed point, N > 0 for the output after N Sinkhorn iterations.

    Returns:
        T (R, n) in the dtype of the scores; lambda (R,) float64; residual and sweeps (R, 2) float64.
    """
    sign = 1.0 if largest else -1.0
    k_r, tau_r = _per_row(k, k_value, scores), _per_row(tau, tau_value, scores)
    valid = valid_entries(scores, lengths, mask)
    x = (sign * scores.to(torch.float64)).masked_fill(~valid, -torch.inf)
    finite = valid & (x > -torch.inf)
    count, n_valid = finite.sum(-1), valid.sum(-1)
    bad = (x.isnan() | (x == torch.inf)).any(-1)
    bad = bad | ~((k_r >= 0) & (k_r <= n_valid)) | ~((tau_r > 0) & tau_r.isfinite())
    nothing, everything = ~bad & (k_r == 0), ~bad & (k_r > 0) & (k_r >= count)
    solvable = ~(bad | nothing | everything)

    rows = solvable.nonzero().squeeze(-1)
    threshold = torch.full_like(k_r, torch.nan)
    threshold[nothing], threshold[everything] = torch.inf, -torch.inf
    weights = torch.zeros_like(x)
    weights[everything] = finite[everything].to(torch.float64)
    weights[bad] = weights[bad].masked_fill(valid[bad], torch.nan)
    certificate = torch.zeros(scores.shape[0], 2, dtype=torch.float64, device=scores.device)
    certificate[:, 0] = torch.where(everything, count - k_r, certificate[:, 0]).masked_fill(bad, torch.nan)
    certificate[:, 1] = 1.0 if scores.shape[-1] > 0 else 0.0
    if rows.numel() > 0:
        x_s, finite_s, k_s, tau_s = x[rows], finite[rows], k_r[rows], tau_r[rows]
        if sinkhorn_iterations > 0:
            pivot = torch.full_like(k_s, 0.5 * sign)
            c, factor = _sinkhorn(x_s, finite_s, k_s, tau_s, sign, sinkhorn_iterations)
            sweeps = torch.full_like(k_s, float(sinkhorn_iterations))
        else:
            pivot, c, sweeps = _solve(x_s, finite_s, k_s, tau_s)
            factor = torch.ones_like(k_s)
        taken = torch.sigmoid((x_s - pivot[:, None]) / tau_s[:, None] + c[:, None]) * finite_s
        weights[rows] = taken * factor[:, None]
        threshold[rows] = pivot - c * tau_s
        certificate[rows] = torch.stack([taken.sum(-1) - k_s, sweeps + 1], -1)
    return weights.to(scores.dtype), sign * threshold, certificate


def soft_topk_backward(
    grad_weights: Tensor,
    scores: Tensor,
    threshold: Tensor,
    grad_threshold: Tensor | None,
    tau: Tensor | None,
    tau_value: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    largest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The implicit gradient, itself differentiable (math.md section 1).

    With w = T (1 - T), W = sum w and gbar = (sum w g - sign tau g_lambda) / W:

        dL/ds_i = sign w_i (g_i - gbar)/tau,   dL/dk = gbar,   dL/dtau = -(1/tau) sum w_i (g_i - gbar) t_i

    Where W underflows (a hard selection) the gradient is 0.

    Args:
        grad_weights: (R, n), dL/dT; grad_threshold: (R,) float64 or None, dL/dlambda.
        threshold: (R,) float64, lambda of the forward pass.

    Returns:
        dL/ds (R, n) in the dtype of the scores, dL/dk (R,) and dL/dtau (R,) in float64.
    """
    sign = 1.0 if largest else -1.0
    tau_r = _per_row(tau, tau_value, scores)[:, None]
    s, g = scores.to(torch.float64), grad_weights.to(torch.float64)
    live = valid_entries(scores, lengths, mask) & s.isfinite() & threshold.isfinite()[:, None]
    s, g = s.masked_fill(~live, 0.0), g.masked_fill(~live, 0.0)
    lambda_ = threshold.masked_fill(~threshold.isfinite(), 0.0)[:, None]
    t = sign * (s - lambda_) / tau_r
    w = (torch.sigmoid(t) * torch.sigmoid(-t)).masked_fill(~live, 0.0)
    total = w.sum(-1, keepdim=True)
    pulled = (w * g).sum(-1, keepdim=True)
    if grad_threshold is not None:
        pulled = pulled - sign * tau_r * grad_threshold.to(torch.float64)[:, None]
    soft = total > torch.finfo(torch.float64).tiny
    mean = (pulled / total.masked_fill(~soft, 1.0)).masked_fill(~soft, 0.0)
    flow = w * (g - mean)
    grad_tau = -(flow * t).sum(-1) / tau_r.squeeze(-1)
    return (sign * flow / tau_r).to(scores.dtype), mean.squeeze(-1), grad_tau

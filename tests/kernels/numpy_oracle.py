"""Soft top-k in float64 NumPy, by bisection, row by row; and the storage types that NumPy lacks. No torch.

Legend: s scores, x = sign * s, p pivot, T_i = sigma((x_i - p)/tau + c), sum T = k, lambda = sign * (p - c tau).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DTYPES = ("float32", "float64", "bfloat16", "float16")
STORAGE = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.uint16),
}


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 numbers as `dtype`, rounded to nearest even; bfloat16 and float16 as their bits in uint16."""
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    if dtype != "bfloat16":
        return x.astype(dtype)
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of `narrow`, exact: float64."""
    if dtype == "float16":
        return stored.view(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def sigmoid(t: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(t))
    return np.where(t >= 0, 1 / (1 + e), e / (1 + e))


def forward(x: np.ndarray, k: float, tau: float) -> np.ndarray:
    """T of the valid entries `x` of one row, (n,) float64; NaN where the row has no answer."""
    if np.isnan(x).any() or (x == np.inf).any() or not 0 <= k <= len(x) or not 0 < tau < np.inf:
        return np.full(len(x), np.nan)
    finite = np.isfinite(x)
    T = np.zeros(len(x))
    count = int(finite.sum())
    if k == 0 or k >= count:
        T[finite] = 0.0 if k == 0 else 1.0
        return T
    s = x[finite]
    pivot = np.sort(s)[::-1][int(np.ceil(k)) - 1]  # the differences to it are exact where it matters
    z = (s - pivot) / tau
    logit = np.log(k) - np.log(count - k)
    low, high = logit - z.max(), logit - z.min()
    while True:
        c = 0.5 * (low + high)
        if c in (low, high):
            break
        low, high = (low, c) if sigmoid(z + c).sum() > k else (c, high)
    T[finite] = sigmoid(z + c)
    return T


def sinkhorn(x: np.ndarray, k: float, tau: float, sign: float, iterations: int) -> np.ndarray:
    """T after `iterations` of c' = c + logit(k/n) - logit(S/n), S = sum T, started from lambda = sign/2; finite `x`."""
    z = (x - 0.5 * sign) / tau
    c = 0.0
    for _ in range(iterations - 1):
        c += np.log(k / (len(x) - k)) - np.log(sigmoid(z + c).sum() / sigmoid(-z - c).sum())
    T = sigmoid(z + c)
    return T * (k / T.sum())


class Gradients(NamedTuple):
    scores: np.ndarray
    k: float
    tau: float
    slope: float  # W = sum w: at 0 the selection is hard and the gradients are 0
    scale: float  # max w (max |g| + |gbar|)/tau: dL/ds is rounded in these units, even where g - gbar cancels


def backward(s: np.ndarray, g: np.ndarray, threshold: float, g_threshold: float, tau: float, sign: float) -> Gradients:
    """The implicit gradient of one row from its valid entries, all float64.

    With w = T (1 - T), W = sum w and gbar = (sum w g - sign tau g_lambda)/W:
    dL/ds_i = sign w_i (g_i - gbar)/tau,   dL/dk = gbar,   dL/dtau = -(1/tau) sum w_i (g_i - gbar) t_i.
    """
    finite = np.isfinite(s)
    if not np.isfinite(threshold) or not finite.any():
        return Gradients(np.zeros(len(s)), 0.0, 0.0, 0.0, 0.0)
    t = np.where(finite, sign * (np.where(finite, s, 0.0) - threshold) / tau, 0.0)
    w = np.where(finite, sigmoid(t) * sigmoid(-t), 0.0)
    total = w.sum()
    mean = ((w * g).sum() - sign * tau * g_threshold) / total if total > np.finfo(np.float64).tiny else 0.0
    flow = w * (g - mean)
    scale = w.max() * (np.abs(g).max() + abs(mean)) / tau
    return Gradients(sign * flow / tau, float(mean), float(-(flow * t).sum() / tau), float(total), float(scale))

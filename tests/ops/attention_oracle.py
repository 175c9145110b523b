"""Attention with soft key weights, one entry at a time in Python's own numbers: nothing shared with what it checks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    weight: Callable[[int, int, int], float],
    bias: Callable[[int, int, int, int], float],
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """o (B, H, L, D) and lse (B, H, L) of q (B, H, L, D), k and v (B, Hk, S, D).

    `weight(b, h, j)` is m, 0 where a key is excluded; `bias(b, h, i, j)` is b, -inf where a query may not see a key.
    """
    batch, heads, queries, width = q.shape
    key_heads, keys = k.shape[1:3]
    out = np.zeros((batch, heads, queries, width))
    lse = np.full((batch, heads, queries), -math.inf)
    for b, h, i in np.ndindex(batch, heads, queries):
        g = h * key_heads // heads
        terms = []
        for j in range(keys):
            m, extra = weight(b, h, j), bias(b, h, i, j)
            if m > 0 and extra > -math.inf:
                x = scale * math.fsum(q[b, h, i, d] * k[b, g, j, d] for d in range(width)) + extra
                terms.append((m * math.exp(x), j))
        total = math.fsum(term for term, _ in terms)
        if total > 0:
            lse[b, h, i] = math.log(total)
            for d in range(width):
                out[b, h, i, d] = math.fsum(term * v[b, g, j, d] for term, j in terms) / total
    return out, lse

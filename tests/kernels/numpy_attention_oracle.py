"""Attention with soft key weights in float64 NumPy, one head of one sample at a time; no torch.

p = m e^x / sum m e^x,  x = scale q k^T + b,  o = (r p) v,  lse = log sum m e^x, and the gradients in closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WORD = np.uint64(0xFFFFFFFF)


class Head(NamedTuple):
    """One head of one sample. Keys that do not count are left out by the caller.

    Attributes:
        q: (L, D); k, v: (S, D); m: (S,); bias: (L, S), -inf where a query may not see a key; r: (L, S), what dropout
            multiplies p by.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    m: np.ndarray
    bias: np.ndarray
    r: np.ndarray
    scale: float


def forward(head: Head) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """o (L, D), lse (L,) and x (L, S); a query without a key has o = 0 and lse = -inf."""
    x = head.scale * head.q @ head.k.T + head.bias
    top = np.where(head.m > 0, x, -np.inf).max(axis=1, initial=-np.inf)
    shift = np.where(np.isfinite(top), top, 0.0)
    e = head.m * np.exp(np.minimum(x - shift[:, None], 600.0))
    total = e.sum(1)
    some = total > 0
    p = np.divide(e, total[:, None], out=np.zeros_like(e), where=some[:, None])
    lse = np.full(len(total), -np.inf)
    lse[some] = np.log(total[some]) + shift[some]
    return (head.r * p) @ head.v, lse, x


class Gradients(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    m: np.ndarray
    bias: np.ndarray


def backward(head: Head, grad_out: np.ndarray, grad_lse: np.ndarray) -> Gradients:
    """The gradients of the sums of o and lse weighted by grad_out (L, D) and grad_lse (L,)."""
    _, lse, x = forward(head)
    some = np.isfinite(lse)
    grad_out, grad_lse = np.where(some[:, None], grad_out, 0.0), np.where(some, grad_lse, 0.0)
    e = np.where(some[:, None], np.exp(x - np.where(some, lse, 0.0)[:, None]), 0.0)
    p, dp = head.m * e, head.r * (grad_out @ head.v.T)
    a = dp - ((p * dp).sum(1) - grad_lse)[:, None]
    ds = p * a
    return Gradients(
        head.scale * ds @ head.k, head.scale * ds.T @ head.q, (head.r * p).T @ grad_out, (e * a).sum(0), ds
    )


def philox(c: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Four words of Philox4x32-7 at counters of four words, all uint64 of one shape."""
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(7):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ key[0], p1 & WORD, (p0 >> np.uint64(32)) ^ c[3] ^ key[1], p0 & WORD]
        key = [(key[0] + np.uint64(0x9E3779B9)) & WORD, (key[1] + np.uint64(0xBB67AE85)) & WORD]
    return c


def keep_factor(b: int, h: int, queries: int, keys: int, p: float, seed: int) -> np.ndarray:
    """(L, S): 0 or 1/(1 - q), q = p in steps of 2^-16, by half j mod 8 of Philox4x32-7 of (j div 8, i, h, b)."""
    if p == 0 or keys == 0:
        return np.ones((queries, keys))
    place = np.arange(keys)
    c = [np.zeros((queries, keys), np.uint64) for _ in range(4)]
    c[0] += (place // 8).astype(np.uint64)
    c[1] += np.arange(queries).astype(np.uint64)[:, None]
    c[2] += np.uint64(h)
    c[3] += np.uint64(b)
    words = np.choose(place % 8 // 2, philox(c, seed))
    draws = (words >> (16 * (place % 2)).astype(np.uint64)) & np.uint64(0xFFFF)
    dropped = round(p * 2**16)
    return (draws >= np.uint64(dropped)) * (2**16 / (2**16 - dropped))

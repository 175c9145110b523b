"""The edge cases of the CPU attention kernels: awkward sizes, both layouts, every option; padding holds NaN."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy_attention_oracle import Gradients, Head, backward, forward, keep_factor
from numpy_oracle import narrow, widen

SIZES = ((1, 1, 1), (7, 5, 8), (49, 193, 17), (50, 64, 128), (3, 400, 64))  # queries, keys, width
DTYPES = ("float32", "bfloat16", "float16")
SEED = 2**33 + 5


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    dtype: str
    queries: int
    keys: int
    width: int
    batch: int = 3
    heads: int = 2
    key_heads: int = 1
    packed: bool = False
    weights: str = "none"  # or "sample", "head"; some are 0
    padding: str = "none"  # or "lengths", "mask"
    bias: tuple[bool, bool, bool] | None = None  # whether batch, heads and queries have entries of their own
    causal: bool = False
    dropout_p: float = 0.0
    exact: bool = False


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"padding": "lengths", "weights": "sample", "causal": True},
    {"padding": "mask", "weights": "head", "exact": True, "bias": (False, True, True)},
    {"packed": True, "weights": "head", "bias": (False, False, False), "dropout_p": 0.3},
    {"packed": True, "weights": "sample", "causal": True, "key_heads": 2},
    {"padding": "lengths", "dropout_p": 0.4, "bias": (True, True, False)},
)


def cases() -> Iterator[AttentionCase]:
    for dtype, size, variant in itertools.product(DTYPES, SIZES, VARIANTS):
        yield AttentionCase(dtype, *size, **variant)
    # Few heads: chunks of queries and of keys.
    yield AttentionCase("float32", 400, 1300, 4, batch=1, padding="lengths", weights="head", causal=True)
    yield AttentionCase("bfloat16", 70, 1300, 4, batch=1, bias=(False, False, True), dropout_p=0.2)
    yield AttentionCase("float32", 70, 1300, 4, batch=1, key_heads=2, packed=True)


class AttentionInputs:
    """What a case stands for: arrays as stored, and the oracle's answers (NaN where nothing is promised)."""

    def __init__(self, case: AttentionCase) -> None:
        self.case = case
        self.rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
        self.query_counts, self.key_counts = self._counts(case.queries), self._counts(case.keys)
        q, do = (self._tokens(self.query_counts, case.queries, case.heads) for _ in range(2))
        k, v = (self._tokens(self.key_counts, case.keys, case.key_heads) for _ in range(2))
        self.m = self._weights()
        self.grad_lse = self.rng.standard_normal((case.batch, case.heads, case.queries)).astype(np.float32)
        self.mask = None
        if case.padding == "mask":
            self.mask = (self.rng.random((case.batch, case.keys)) < 0.6).astype(np.uint8)
            self.mask[-1] = 0
        self.bias = None
        if case.bias is not None:
            sizes = [n if own else 1 for n, own in zip((case.batch, case.heads, case.queries), case.bias, strict=True)]
            self.bias = self.rng.standard_normal((*sizes, case.keys)).astype(np.float32)
        self.stored = {name: narrow(x, case.dtype) for name, x in (("q", q), ("k", k), ("v", v), ("grad_out", do))}
        self.wide = {name: widen(x, case.dtype) for name, x in self.stored.items()}
        self.expected = self._expected()

    def _counts(self, longest: int) -> np.ndarray:
        if self.case.batch == 1 or not (self.case.packed or self.case.padding == "lengths"):
            return np.full(self.case.batch, longest)
        return np.array([longest, 0, (longest + 1) // 2])

    def _tokens(self, counts: np.ndarray, longest: int, heads: int) -> np.ndarray:
        """(B, heads, longest, D), NaN in the padding."""
        x = self.rng.standard_normal((self.case.batch, heads, longest, self.case.width))
        return np.where((np.arange(longest) < counts[:, None])[:, None, :, None], x, np.nan)

    def _weights(self) -> np.ndarray | None:
        case = self.case
        if case.weights == "none":
            return None
        m = self.rng.random((case.batch, case.heads, case.keys)).astype(np.float32)
        m[m < 0.2] = 0
        return m if case.weights == "head" else np.repeat(m[:, :1], case.heads, axis=1)

    def pack(self, x: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(B, heads, T, ...) as (tokens, heads, ...)."""
        return np.concatenate([x[b, :, :n].swapaxes(0, 1) for b, n in enumerate(counts)])

    def _expected(self) -> dict[str, np.ndarray]:
        """Padded arrays, 0 where nothing counts."""
        case, wide = self.case, self.wide
        shape, key_shape = wide["q"].shape, wide["k"].shape
        expected = {
            "out": np.zeros(shape),
            "lse": np.full(shape[:3], -np.inf),
            "grad_q": np.zeros(shape),
            "grad_k": np.zeros(key_shape),
            "grad_v": np.zeros(key_shape),
            "grad_weights": np.zeros((case.batch, case.heads, case.keys)),
            "grad_bias": np.zeros((1,) * 4 if self.bias is None else self.bias.shape),
        }
        for b, h in np.ndindex(case.batch, case.heads):
            head, kept, live = self._head(b, h, zero_weights=False)
            out, lse, _ = forward(head)
            expected["out"][b, h, live], expected["lse"][b, h, live] = out, lse
            if case.exact:
                head, kept, live = self._head(b, h, zero_weights=True)
            grads: Gradients = backward(head, wide["grad_out"][b, h, live], self.grad_lse[b, h, live].astype(float))
            g = h * case.key_heads // case.heads
            expected["grad_q"][b, h, live] = grads.q
            expected["grad_k"][b, g, kept] += grads.k
            expected["grad_v"][b, g, kept] += grads.v
            expected["grad_weights"][b, h, kept] = grads.m
            if self.bias is not None:
                batches, heads, rows, _ = self.bias.shape
                matrix = expected["grad_bias"][b if batches > 1 else 0, h if heads > 1 else 0]
                if rows > 1:
                    matrix[live[:, None], kept] += grads.bias
                else:
                    matrix[0, kept] += grads.bias.sum(0)
        return expected

    def _head(self, b: int, h: int, *, zero_weights: bool) -> tuple[Head, Any, Any]:
        """A head without its padding, and where its keys and its queries are."""
        case, g = self.case, h * self.case.key_heads // self.case.heads
        counts = np.arange(case.keys) < self.key_counts[b]
        if self.mask is not None:
            counts &= self.mask[b] != 0
        m = np.ones(case.keys) if self.m is None else self.m[b, h].astype(float)
        if not zero_weights:
            counts &= m != 0
        kept, live = counts.nonzero()[0], np.arange(self.query_counts[b])
        bias = np.zeros((len(live), len(kept)))
        if self.bias is not None:
            full = np.broadcast_to(self.bias, (case.batch, case.heads, case.queries, case.keys))
            bias = full[b, h][live[:, None], kept].astype(float)
        if case.causal:
            bias = np.where(kept > live[:, None], -np.inf, bias)
        r = keep_factor(b, h, case.queries, case.keys, case.dropout_p, SEED)[live[:, None], kept]
        k, v = (self.wide[name][b, g, kept] for name in "kv")
        head = Head(self.wide["q"][b, h, live], k, v, m[kept], bias, r, case.width**-0.5)
        return head, kept, live

"""The edge cases of the CPU kernels: awkward sizes, strides, padding, infinities, ties; inputs and expected weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy_oracle import DTYPES, forward, narrow, sinkhorn, widen

SIZES = (0, 1, 2, 15, 16, 17, 63, 64, 65, 129, 1134, 5000)
ROWS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: str
    n: int
    scores: str = "normal"  # or "tied", "outlier", "infinite", "far", "nan"
    padding: str = "none"  # or "lengths", "mask"; padded entries hold NaN
    strided: bool = False  # rows apart, and with a gradient of the threshold
    k: str = "number"  # or "rows", "near" (a hair from an integer), "none", "all"
    tau: float = 0.05
    tau_rows: bool = False
    largest: bool = True
    sinkhorn: int = 0


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"padding": "lengths", "k": "rows", "tau_rows": True},
    {"padding": "mask", "strided": True, "k": "rows", "largest": False},
    {"padding": "lengths", "k": "rows", "strided": True, "scores": "tied"},
    {"scores": "outlier", "tau": 5e-5},
    {"k": "near", "tau": 5e-3},
    {"k": "near", "padding": "lengths", "scores": "tied"},
    {"scores": "infinite", "tau": 1.0, "strided": True},
    {"scores": "infinite", "padding": "mask", "k": "rows", "largest": False},
    {"scores": "far", "strided": True},
    {"scores": "nan", "padding": "lengths", "k": "rows"},
    {"k": "none", "padding": "mask"},
    {"k": "all", "padding": "lengths"},
    {"tau": 0.5, "sinkhorn": 1},
    {"tau": 0.5, "sinkhorn": 7, "strided": True, "largest": False},
)

FAR = {"float32": 3e38, "float64": 1e300, "bfloat16": 3e38, "float16": 6e4}


def cases(dtypes: Iterable[str] = DTYPES, sizes: Iterable[int] = SIZES) -> Iterator[Case]:
    for dtype, n, variant in itertools.product(dtypes, sizes, VARIANTS):
        if n < 1000 or variant in VARIANTS[:3]:
            yield Case(dtype, n, **variant)


class Inputs:
    """What a case stands for. Numbers as stored (`*_stored`) and exactly as float64; rows have padding NaN.

    Attributes:
        scores, grads: (ROWS, n) scores and dL/dT; lengths: (ROWS,) or None; mask: (ROWS, n) uint8 or None.
        valid: (ROWS, n) bool, the entries that take part.
        k, tau, grad_threshold: (ROWS,).
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.sign = 1.0 if case.largest else -1.0
        rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
        shape = (ROWS, case.n)
        self.valid = np.ones(shape, dtype=bool)
        self.lengths = self.mask = None
        if case.padding == "lengths":
            self.lengths = np.array([case.n, case.n // 2, 0])
            self.valid = np.arange(case.n) < self.lengths[:, None]
        if case.padding == "mask":
            self.valid = rng.random(shape) < 0.6
            self.mask = self.valid.astype(np.uint8)
        self.scores_stored = narrow(np.where(self.valid, self._draw_scores(rng), np.nan), case.dtype)
        self.grads_stored = narrow(np.where(self.valid, rng.standard_normal(shape), np.nan), case.dtype)
        self.scores = widen(self.scores_stored, case.dtype)
        self.grads = widen(self.grads_stored, case.dtype)
        count = self.valid.sum(-1)
        shares = {"number": 0.4, "none": 0.0, "all": 1.0}
        self.k = count * shares.get(case.k, np.array([0.4, 0.07, 0.9]))
        if case.k == "near":
            self.k = np.clip(np.round(self.k) + np.array([1e-9, -1e-5, 1e-12]), 0, count)
        self.tau = np.full(ROWS, case.tau) * (np.array([1.0, 0.1, 3.0]) if case.tau_rows else 1.0)
        self.grad_threshold = rng.standard_normal(ROWS) if case.strided else np.zeros(ROWS)

    def _draw_scores(self, rng: np.random.Generator) -> np.ndarray:
        case = self.case
        s = rng.standard_normal((ROWS, case.n))
        if case.scores == "tied":
            s = np.round(s)
        if case.scores == "outlier" and case.n > 0:
            s[:, 0] = 1e4
        if case.scores == "infinite":
            s[rng.random(s.shape) < 0.3] = -self.sign * np.inf
        if case.scores == "far":  # in float32 so many tau away that it has infinity for it
            s[rng.random(s.shape) < 0.3] = -self.sign * FAR[case.dtype]
        if case.scores == "nan" and case.n > 0:
            s[0, 0] = np.nan
            s[1, 0] = np.inf
        return s

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """(ROWS, n): the oracle's T, 0 in the padding, NaN where a row has no answer."""
        weights = np.zeros(self.valid.shape)
        for row in range(ROWS):
            x = self.sign * self.scores[row, self.valid[row]]
            k, tau = self.k[row], self.tau[row]
            if self.case.sinkhorn > 0 and 0 < k < len(x):
                weights[row, self.valid[row]] = sinkhorn(x, k, tau, self.sign, self.case.sinkhorn)
            else:
                weights[row, self.valid[row]] = forward(x, k, tau)
        return weights

"""The edge cases of the CPU kernels of dropout and of what is fused with it; inputs and expected results in float64."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator

import numpy as np
from numpy_attention_oracle import philox
from numpy_oracle import DTYPES, narrow, widen

ROWS, COLUMNS = (0, 1, 3, 40), (1, 7, 64, 129, 1134)
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class DropoutCase:
    dtype: str
    rows: int
    cols: int
    p: float
    biased: bool  # whether there is a bias of x


def cases() -> Iterator[DropoutCase]:
    for dtype, rows, cols in itertools.product(DTYPES, ROWS, COLUMNS):
        if rows < 40 or cols in (7, 64):
            for p, biased in ((0.1, True), (0.5, False), (0.0, True)):
                yield DropoutCase(dtype, rows, cols, p, biased)


class DropoutInputs:
    """What a case stands for. Numbers as stored (`*_stored`) and exactly as float64.

    Attributes:
        x, residual, grad: (rows, cols); x_bias, weight, bias: (cols,); mask: (rows, cols), 0 or 1/(1 - q).
    """

    def __init__(self, case: DropoutCase) -> None:
        self.case = case
        rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
        shape, wide = (case.rows, case.cols), "float64" if case.dtype == "float64" else "float32"
        self.seed = int(rng.integers(0, 2**63))
        self.x_stored, self.residual_stored, self.grad_stored = (
            narrow(rng.standard_normal(shape), case.dtype) for _ in range(3)
        )
        self.x, self.residual, self.grad = (
            widen(a, case.dtype) for a in (self.x_stored, self.residual_stored, self.grad_stored)
        )
        self.x_bias, self.weight, self.bias = (rng.standard_normal(case.cols).astype(wide) for _ in range(3))
        self.mask = mask(shape, case.p, self.seed)

    @property
    def branch(self) -> np.ndarray:
        """x + x_bias, float64."""
        return self.x + self.x_bias.astype(np.float64) * self.case.biased


def mask(shape: tuple[int, int], p: float, seed: int) -> np.ndarray:
    """Transcribed from kernels/common/dropout_args.h."""
    count, dropped = shape[0] * shape[1], round(p * 65536)
    groups = np.arange((count + 7) // 8, dtype=np.uint64)
    words = np.stack(philox([groups, *(np.zeros_like(groups) for _ in range(3))], seed), -1)
    halves = np.stack((words & np.uint64(0xFFFF), words >> np.uint64(16)), -1).reshape(-1)[:count]
    return ((halves >= dropped) * (65536 / (65536 - dropped))).reshape(shape)


def layer_norm(s: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, xhat (rows, cols) and rstd (rows, 1)."""
    rstd = 1 / np.sqrt(s.var(1, keepdims=True) + EPS)
    xhat = (s - s.mean(1, keepdims=True)) * rstd
    return xhat * weight + bias, xhat, rstd

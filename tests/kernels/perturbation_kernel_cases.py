"""The edge cases of the CPU kernels of the weight perturbation: pairs of dtypes, scales near their limits, NaNs.

With what is expected of them, exactly. Entries are kept as their bits, which alone tell NaNs and zeros apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy_oracle import DTYPES, narrow, widen

SIZES = (0, 1, 7, 129, 1134, 32768 + 5)  # one call; the last has two chunks
ROUNDING = 2.0**-53
SMALLEST = 2.0**-1074  # of float64
SCOPES = {"global": 0, "tensor": 1, "awp": 2}


class Format(NamedTuple):
    bits: np.dtype
    mantissa: int  # explicit bits
    lowest: int  # exponent of the smallest normal number


FORMATS = {
    "float32": Format(np.dtype(np.uint32), 23, -126),
    "float64": Format(np.dtype(np.uint64), 52, -1022),
    "bfloat16": Format(np.dtype(np.uint16), 7, -126),
    "float16": Format(np.dtype(np.uint16), 10, -14),
}
# Of gradients: squares that overflow and underflow, and subnormal numbers. float16: norm 128000, beyond its largest.
SCALES = {
    "float32": (1e-30, 1e30, 1e-42),
    "float64": (1e-200, 1e200, 1e-310, 1e-160),
    "bfloat16": (1e-30, 1e30, 1e-38),
    "float16": (128000 / sum(SIZES) ** 0.5, 1e-6),
}


@dataclasses.dataclass(frozen=True)
class PerturbationCase:
    weight_dtype: str  # "mixed": another for every tensor
    grad_dtype: str
    scope: str = "global"
    adaptive: bool = False
    begins: str = "anywhere"  # and ends at the guard page; or "line": at a cache line's first byte, or "off" it
    streaming: bool = False
    weights: str = "normal"  # or "special": NaNs of all kinds, -0, infinities, subnormal numbers
    grads: str = "normal"  # or "zero", or one "nan", "inf" or "-inf"
    grad_scale: float = 1.0
    weight_scale: float = 1.0
    radius: float = 0.37


VARIANTS: tuple[dict[str, Any], ...] = (
    {"streaming": True},
    {"scope": "tensor", "begins": "line", "streaming": True, "weights": "special"},
    {"scope": "awp", "begins": "off", "streaming": True},
    {"adaptive": True, "begins": "line", "streaming": True},
    {"scope": "tensor", "adaptive": True, "begins": "off"},
    {"scope": "awp", "begins": "line", "weights": "special"},
    {"adaptive": True, "weights": "special", "grads": "zero"},
    {"scope": "tensor", "begins": "off", "weights": "special", "grads": "nan"},
    {"begins": "line", "streaming": True, "weights": "special", "grads": "inf"},
    {"scope": "tensor", "adaptive": True, "grads": "-inf"},
    {"begins": "off", "streaming": True, "weights": "special", "radius": 0.0},
)


def cases() -> Iterator[PerturbationCase]:
    for weight, grad in itertools.product(DTYPES, DTYPES):
        for variant in VARIANTS:
            yield PerturbationCase(weight, grad, **variant)
        for scale, adaptive in itertools.product(SCALES[grad], (False, True)):
            scope = "tensor" if adaptive == (weight == grad) else "global"
            yield PerturbationCase(weight, grad, scope, adaptive, "line", grad_scale=scale)
        yield PerturbationCase(weight, grad, "awp", grad_scale=SCALES[grad][0], weight_scale=SCALES[weight][1])
    for scope, adaptive in (("global", False), ("global", True), ("tensor", True), ("awp", False)):
        yield PerturbationCase("mixed", "mixed", scope, adaptive)
    for weight_scale, grad_scale in (
        (1e-150, 1e150),
        (1e150, 1e-150),
        (1e-310, 1e300),
        (1e300, 1e-310),
        (1e200, 1e200),
        (1e-200, 1e-200),
    ):
        yield PerturbationCase("float64", "float64", adaptive=True, weight_scale=weight_scale, grad_scale=grad_scale)


class PerturbationInputs:
    """What a case stands for: lists, an entry for each of `SIZES`.

    Attributes:
        weight_dtypes, grad_dtypes: their names.
        weights, grads: (n,) their bits.
        wide_weights, wide_grads: (n,) the same numbers as float64.
        groups: for each norm the tensors that it is over.
    """

    def __init__(self, case: PerturbationCase) -> None:
        self.case = case
        rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
        count = len(SIZES)
        self.weight_dtypes = [case.weight_dtype] * count
        self.grad_dtypes = [case.grad_dtype] * count
        if case.weight_dtype == "mixed":
            self.weight_dtypes = [DTYPES[i % 4] for i in range(count)]
            self.grad_dtypes = [DTYPES[3 - i // 2] for i in range(count)]
        self.weights, self.grads = [], []
        for n, weight_dtype, grad_dtype in zip(SIZES, self.weight_dtypes, self.grad_dtypes, strict=True):
            weights = _bits(case.weight_scale * rng.standard_normal(n), weight_dtype)
            if case.weights == "special":
                values = special(weight_dtype)
                weights[::3] = np.resize(values, len(weights[::3]))
            grads = case.grad_scale * np.clip(rng.standard_normal(n), -4, 4) * (case.grads != "zero")
            if case.grads not in ("normal", "zero") and n in (7, SIZES[-1]):
                grads[-1] = float(case.grads)
            self.weights.append(weights)
            self.grads.append(_bits(grads, grad_dtype))
        self.wide_weights = [numbers(x, dtype) for x, dtype in zip(self.weights, self.weight_dtypes, strict=True)]
        self.wide_grads = [numbers(x, dtype) for x, dtype in zip(self.grads, self.grad_dtypes, strict=True)]
        self.groups = [list(range(count))] if case.scope == "global" else [[i] for i in range(count)]

    def norm(self, group: list[int]) -> float:
        """|u|_2, u = g or w g."""
        grads = np.concatenate([self.wide_grads[i] for i in group])
        weights = np.concatenate([self.wide_weights[i] for i in group])
        return exact_norm(weights, grads) if self.case.adaptive else exact_norm(grads)

    def weight_norm(self, tensor: int) -> float:
        return exact_norm(self.wide_weights[tensor])

    def moved(self, tensor: int, norm: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
        """w + reach d/norm with d = g or w^2 g, long double; and how far off it may be before storage rounds it."""
        w = self.wide_weights[tensor].astype(np.longdouble)
        step = self.wide_grads[tensor].astype(np.longdouble) / norm
        subnormal = np.full_like(w, SMALLEST) * reach  # products on the way are multiples of SMALLEST
        if self.case.adaptive:
            step = (step * w) * w
            subnormal *= 1 + np.abs(w) / norm
        step *= reach
        slack = 4 * ROUNDING * np.abs(step) + np.finfo(np.longdouble).eps * np.abs(w + step) + subnormal
        return w + step, slack


def exact_norm(*factors: np.ndarray) -> float:
    """|x_1 x_2 ...|_2 to a few roundings; not finite where an entry is not.

    Powers of two bring the largest entry of every factor near 1 first: nothing that counts overflows or underflows.
    """
    product, exponent = np.ones(()), 0
    for x in factors:
        if not np.isfinite(x).all():
            return math.nan
        e = math.frexp(float(np.abs(x).max(initial=0)))[1]
        product, exponent = product * np.ldexp(x, -e), exponent + e
    root = math.sqrt(math.fsum((product * product).tolist()))
    with np.errstate(over="ignore"):
        return float(np.ldexp(root, exponent))


def half_ulp(x: np.ndarray, dtype: str) -> np.ndarray:
    """Half the distance of neighbours in `dtype` around the finite long doubles `x`: all that one rounding may cost."""
    exponent = np.where(x == 0, -(2**14), np.frexp(x)[1] - 1)
    form = FORMATS[dtype]
    return np.ldexp(np.longdouble(0.5), np.maximum(exponent, form.lowest) - form.mantissa)


def special(dtype: str) -> np.ndarray:
    """Bits that a copy as numbers would change or lose."""
    bits, m, _ = FORMATS[dtype]
    sign = 1 << (8 * bits.itemsize - 1)
    infinity = sign - (1 << m)
    quiet = 1 << (m - 1)
    values = [infinity | 1, sign, infinity | quiet | 5, sign | infinity | quiet, sign | infinity | (quiet - 1), 0]
    values += [infinity, sign | infinity, infinity - 1, 1, sign | 3]
    return np.array(values, bits)


def _bits(x: np.ndarray, dtype: str) -> np.ndarray:
    return narrow(x, dtype).view(FORMATS[dtype].bits)


def numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Bits as the numbers that they stand for, float64, every NaN a quiet one."""
    with np.errstate(invalid="ignore"):
        return 1.0 * widen(bits if dtype.endswith("16") else bits.view(dtype), dtype)

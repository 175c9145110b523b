"""Power laws through measured times: y = c x^b by least squares of log y on log x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient x^exponent; `error` is the root mean square of log(y / fitted y)."""

    coefficient: float
    exponent: float
    error: float

    def at(self, x: float) -> float:
        return float(self.coefficient * x**self.exponent)


def fit(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw:
    """The power law of the points.

    Args:
        xs, ys: above 0, of the same length; two different x at least.

    Raises:
        ValueError: other points than these.
    """
    if len(xs) != len(ys) or len(set(xs)) < 2 or min((*xs, *ys), default=0) <= 0:
        raise ValueError(f"xs and ys must be as many numbers above 0, two different x at least, got {xs} and {ys}")
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    variance = sum((x - mean_x) ** 2 for x in log_x)
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in zip(log_x, log_y, strict=True)) / variance
    constant = mean_y - exponent * mean_x
    squares = sum((y - constant - exponent * x) ** 2 for x, y in zip(log_x, log_y, strict=True))
    return PowerLaw(math.exp(constant), exponent, math.sqrt(squares / len(log_x)))


def upper_half(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw:
    """The power law of the larger half of the points, x ascending: where what a call costs anyway no longer counts."""
    start = (len(xs) - 1) // 2
    return fit(xs[start:], ys[start:])

"""Power laws through measured times: y = c x^b by least squares of log y on log x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PowerLaw:
    """The exponent b of y = c x^b, and its standard error."""

    exponent: float
    error: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ± {self.error:.2f}"


def fit(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw:
    """The power law of the points.

    Args:
        xs, ys: above 0, of the same length; three different x at least.

    Raises:
        ValueError: other points than these.
    """
    if len(xs) != len(ys) or len(set(xs)) < 3 or min((*xs, *ys), default=0) <= 0:
        raise ValueError(f"xs and ys must be as many numbers above 0, three different x at least, got {xs} and {ys}")
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    spread = sum((x - mean_x) ** 2 for x in log_x)
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in zip(log_x, log_y, strict=True)) / spread
    left = sum((y - mean_y - exponent * (x - mean_x)) ** 2 for x, y in zip(log_x, log_y, strict=True))
    return PowerLaw(exponent, math.sqrt(left / (len(xs) - 2) / spread))


def upper_half(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw:
    """The power law of the larger half of the points, x ascending: where what a call costs anyway no longer counts.

    Three points at least are fitted.
    """
    start = min((len(xs) - 1) // 2, max(0, len(xs) - 3))
    return fit(xs[start:], ys[start:])

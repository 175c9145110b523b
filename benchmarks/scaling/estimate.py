"""A paper estimate of larger problems and machines: the fitted growth, over how much higher the ceilings are.

    time(x, machine) = time(x0) (x / x0)^b · ceiling here / ceiling there

x0 is the largest point that was measured and b the exponent of the upper half. The ceiling is the one that bounds x0:
a copy, a matrix product, or a sigmoid. So the estimate takes for granted that the share of the roofline stays as it is.
"""

from __future__ import annotations

from typing import Any

from benchmarks.scaling.fit import PowerLaw

MACHINES = (1, 4, 16)
"""How many times the ceilings of the machine that was measured."""


def microseconds(last: dict[str, Any], law: PowerLaw, x: float, times: float) -> float:
    """The time at `x` on a machine whose ceilings are `times` as high.

    Args:
        last: the row of the largest point.
        law: of the upper half.
    """
    return float(last["us"] * (x / last["at"]) ** law.exponent / times)


def ceilings(result: dict[str, Any], times: float) -> str:
    """What such a machine reaches, in words."""
    measured = result["ceilings"]
    product = max(measured["matmul_gflops"].values())
    sigmoids = measured["sweep"][-1]["gsigmoids"]
    return (
        f"copy {times * measured['copy_gbps']:.0f} GB/s, product {times * product:.0f} GFLOP/s, "
        f"sigmoid {times * sigmoids:.2g} G/s"
    )

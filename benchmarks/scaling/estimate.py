"""A paper estimate of larger problems and machines: the share of the roofline of the largest point, kept.

    time(x, machine) = time(x0) (x / x0)^b · ceiling here / ceiling there

x0 is the largest point that was measured, b the exponent by counting: how the floor of the roofline grows. The ceiling
is the one that bounds x0: a copy, a matrix product, or a sigmoid.
"""

from __future__ import annotations

from typing import Any

from benchmarks.scaling.sweeps import Sweep

MACHINES = (1, 4, 16)
"""How many times the ceilings of the machine that was measured."""
DTYPE = "float32"
"""Of every sweep, and so of the product that is their ceiling."""


def microseconds(last: dict[str, Any], sweep: Sweep, x: float, times: float) -> float:
    """The time at `x` on a machine whose ceilings are `times` as high.

    Args:
        last: the row of the largest point of the sweep.
    """
    return float(last["us"] * (x / last["at"]) ** sweep.counted / times)


def ceilings(result: dict[str, Any], times: float) -> str:
    """What such a machine reaches, in words."""
    measured = result["ceilings"]
    product = measured["matmul_gflops"][DTYPE]
    sigmoids = measured["sweep"][-1]["gsigmoids"]
    return (
        f"copy {times * measured['copy_gbps']:.0f} GB/s, product {times * product:.0f} GFLOP/s, "
        f"sigmoid {times * sigmoids:.2g} G/s"
    )

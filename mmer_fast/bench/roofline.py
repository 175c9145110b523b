"""The least time in which a machine could do a call, and the share of a call's time that this is.

    floor = max(bytes / copy bandwidth, FLOP / rate of a product, sigmoids / rate of torch.sigmoid)

What is counted is what any program that computes the same has to do: each input is read once and each result written
once, however often a contestant goes over them. The rates take their turns beside the contestants; copy and sigmoid
have as many values as the case.

    soft top-k     s read, T written; backward s, dL/dT read, dL/ds written; the sigmoid of the plan at each valid entry
    attention      q, k, v read, o written; backward all of them and dL/do read, three gradients written; 4 D FLOP a
                   valid pair of a head forward (q k^T and p v), 10 D backward (q k^T again, dv, dp, dq, dk)
    perturbation   7 values an entry: g for the norm; w, g read, w' and the copy written; the copy read, w written
    training step  the FLOP of the matrix products and of attention in the fast step that has the fewest

Exponentials of attention and the step's bytes are left out: their floor is not known to be one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes moved, FLOP of products, sigmoids."""

    bytes: float = 0.0
    flops: float = 0.0
    sigmoids: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What the machine does a second, in 10^9: bytes of a copy, FLOP of a product, sigmoids."""

    gbps: float | None = None
    gflops: float | None = None
    gsigmoids: float | None = None


def roofline(work: Work, rates: Rates, seconds: float) -> dict[str, Any]:
    """The entries of a row: ``floor_us``, ``bound`` (which rate sets it) and ``roofline``, the floor over the time.

    Raises:
        ValueError: work without its rate.
    """
    floors = {}
    for bound, amount, rate in (
        ("memory", work.bytes, rates.gbps),
        ("matrix products", work.flops, rates.gflops),
        ("sigmoids", work.sigmoids, rates.gsigmoids),
    ):
        if amount and rate is None:
            raise ValueError(f"rates must have one for {bound}, got {rates}")
        if amount and rate is not None:
            floors[bound] = amount / rate * 1e-9
    bound = max(floors, key=lambda name: floors[name])
    return {"floor_us": floors[bound] * 1e6, "bound": bound, "roofline": floors[bound] / seconds}

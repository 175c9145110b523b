"""What the benchmarks share: the passes, the figures of a row, who takes part, errors.

A case is timed only after its results are right: each contestant that computes what we compute is compared with the
float64 reference, in value and in gradient. Where ours is wrong the case is not timed and the run fails.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from mmer_fast.bench import timing

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
OK = "ok"

Row = dict[str, Any]


class WrongResultError(RuntimeError):
    """A contestant of ours raised or is not within the tolerances of the float64 reference: its case is not timed."""


class NoBackendError(RuntimeError):
    """No backend of ours can run on the device, so that there is nothing to compare with."""


def figures(own: timing.Timing, base: timing.Timing) -> Row:
    """Microseconds of a call, and how many times those of `base` they are: medians and percentiles of the turns."""
    turns, side_by_side = own.taken(), timing.ratios(own, base)
    return {
        **{f"us{name}": seconds * 1e6 for name, seconds in _spread(turns).items()},
        "rounds": len(turns),
        "calls": own.calls,
        **{f"ratio{name}": ratio for name, ratio in _spread(side_by_side).items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "": statistics.median(values),
        "_min": min(values),
        "_p20": timing.percentile(values, 20),
        "_p80": timing.percentile(values, 80),
        "_max": max(values),
    }


def select(pool: list[str], ours: set[str], always: set[str], parts: list[str] | None) -> list[str]:
    """The names of `pool` that contain one of `parts`; all of them without.

    Those of `always` take part in any case, and those of `ours` too unless `parts` picks among them.

    Raises:
        ValueError: a part that fits no name.
    """
    if not parts:
        return pool
    for part in parts:
        if not any(part in name for name in pool):
            raise ValueError(f"contestants must be among {', '.join(pool)}, got {part!r}")
    picked = {name for name in pool if name in always or any(part in name for part in parts)}
    return [name for name in pool if name in picked or (name in ours and not ours & picked)]


def brief(error: BaseException) -> str:
    """An exception as the status of a row."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}".splitlines()[0][:160]


def memory_limit(device: str) -> float:
    """Bytes that the graph of one contestant may keep alive."""
    return 0.5 * torch.cuda.mem_get_info()[0] if device == "cuda" else 4e9

"""Side-by-side timing in one process, made for machines that are not quiet.

Contestants take turns, A B C A B C ..., so that whatever disturbs the machine disturbs all of them. Each turn gives the
median of its calls; a contestant's time is the median of its turns, and a ratio is the median of the ratios of turns
that lie side by side. On CUDA a turn is `triton.testing.do_bench`, which empties the L2 cache before each call.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]
Turn = Callable[[Call, float], tuple[float, int]]
_LONG = 10  # turns


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: turns of each contestant.
        turn_s: seconds that a turn should last; at least one call.
        budget_s: seconds for one contestant; who needs more gets fewer turns, and who needs more than that for a
            single call is timed by the call that checked it.
    """

    rounds: int
    turn_s: float
    budget_s: float


PLANS = {
    "quick": {"cpu": Plan(3, 0.01, 0.5), "cuda": Plan(1, 0.01, 0.1)},
    "standard": {"cpu": Plan(9, 0.05, 1.0), "cuda": Plan(3, 0.02, 0.5)},
    "full": {"cpu": Plan(25, 0.1, 8.0), "cuda": Plan(9, 0.05, 2.0)},
}
"""Name → device type → plan."""


@dataclass
class Timing:
    """Seconds a call: the median of each turn, None where a slow contestant sat out, and the number of calls."""

    turns: list[float | None] = field(default_factory=list)
    calls: int = 0

    def median(self) -> float:
        return statistics.median(self.taken())

    def taken(self) -> list[float]:
        return [seconds for seconds in self.turns if seconds is not None]


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the sorted `values` lie, between two of them by a straight line."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def ratios(timing: Timing, base: Timing) -> list[float]:
    """`timing` over `base`, round by round where both took their turn."""
    pairs = zip(timing.turns, base.turns, strict=True)
    return [a / b for a, b in pairs if a is not None and b is not None]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_once(call: Call, device: str) -> tuple[Any, float]:
    """The result of one call and its wall time in seconds."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start


def cpu_turn(call: Call, turn_s: float) -> tuple[float, int]:
    """Median seconds of the calls that fit into `turn_s`, after one that warms caches and threads up.

    A call that lasts ten turns is one by itself: what it would warm is nothing beside it.
    """
    _, warm = time_once(call, "cpu")
    if warm >= _LONG * turn_s:
        return warm, 1
    seconds: list[float] = []
    end = time.perf_counter() + turn_s - min(warm, turn_s)
    while not seconds or time.perf_counter() < end:
        start = time.perf_counter_ns()
        call()
        seconds.append((time.perf_counter_ns() - start) * 1e-9)
    return statistics.median(seconds), len(seconds)


def cuda_turn(call: Call, turn_s: float) -> tuple[float, int]:
    """Median seconds between CUDA events around a call, cold L2."""
    from triton.testing import do_bench

    milliseconds = do_bench(call, warmup=5, rep=max(1, round(turn_s * 1e3)), return_mode="all")
    return statistics.median(milliseconds) * 1e-3, len(milliseconds)


def _cost(estimate: float, turn_s: float, device: str) -> float:
    """Seconds of a turn of a call that takes `estimate`: a warm-up and a call at least, on CUDA do_bench's eight."""
    calls = 8 if device == "cuda" else 2 if estimate < _LONG * turn_s else 1
    return max(turn_s, calls * estimate)


TURNS: dict[str, Turn] = {"cpu": cpu_turn, "cuda": cuda_turn}


@contextmanager
def _no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(calls: dict[str, Call], estimates: dict[str, float], plan: Plan, device: str) -> dict[str, Timing]:
    """Times `calls` in rounds.

    Args:
        calls: the contestants, warmed up.
        estimates: seconds of a call of each, from its check.
        plan: how many turns, and how long.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        For each contestant a `Timing` of ``plan.rounds`` turns.
    """
    turn = TURNS[device]
    cost = {name: _cost(estimates[name], plan.turn_s, device) for name in calls}
    timings = {name: Timing() for name in calls}
    with _no_collector():
        for round_index in range(plan.rounds):
            for name, call in calls.items():
                timing = timings[name]
                if estimates[name] > plan.budget_s:
                    timing.turns.append(estimates[name] if round_index == 0 else None)
                    timing.calls = 1
                elif round_index > 0 and (round_index + 1) * cost[name] > plan.budget_s:
                    timing.turns.append(None)
                else:
                    seconds, count = turn(call, plan.turn_s)
                    timing.turns.append(seconds)
                    timing.calls += count
    return timings

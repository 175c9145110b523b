"""What a call costs beside time: the memory that it allocates, and kernel launches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mmer_fast.bench import timing

T = TypeVar("T")
_PATIENCE = 2.0  # seconds


def quiet_profiler() -> None:
    """Keeps the profiler from writing a line for each start and stop; to be called before its first use."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def with_peak_bytes(call: Callable[[], T], device: str) -> tuple[T, int]:
    """The result of a call, and the most that it held of what it allocated."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    quiet_profiler()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results
    assert events is not None
    return result, highest((e.start_ns(), e.nbytes()) for e in events.events() if e.name() == "[memory]")


def extra_bytes(call: Callable[[], object], seconds: float, device: str) -> int | None:
    """The most that a warm call holds of what it allocates; None of one that takes too long for a call more."""
    return with_peak_bytes(call, device)[1] if seconds < _PATIENCE else None


def highest(changes: Iterable[tuple[int, int]]) -> int:
    """The largest sum of the first bytes, of (time, bytes allocated or, below 0, freed) in any order."""
    held = peak = 0
    for _, count in sorted(changes, key=lambda change: change[0]):
        held += count
        peak = max(peak, held)
    return peak


def launches(call: Callable[[], object], device: str) -> int | None:
    """Kernels that a warm call runs on a GPU; None on the CPU."""
    if device != "cuda":
        return None
    quiet_profiler()
    timing.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        timing.synchronize(device)
    return count_kernels((event.name, event.device_type) for event in recorded.events() or ())


def count_kernels(events: Iterable[tuple[str, DeviceType]]) -> int:
    """Kernels among the events of a profile; copies and fills are none, and annotations were none to begin with."""
    return sum(device == DeviceType.CUDA and not name.startswith(("Mem", "Optimizer.")) for name, device in events)

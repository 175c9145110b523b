"""Memory that runs out, as torch says it, in a chosen call, and the line with which training stops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import Silent, train

from mmer_fast.training.errors import TrainingError

BYTES = 2**50  # more than there are addresses
ON_A_DEVICE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is free."
)
ADVICE = (
    " Including non-PyTorch memory, this process has 77.60 GiB memory in use. If reserved but unallocated memory is "
    "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
FOR_THE_CPU = (
    f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {BYTES} bytes. "
    "Error code 12 (Cannot allocate memory)"
)


def fill_a_device() -> None:
    raise torch.OutOfMemoryError(ON_A_DEVICE + ADVICE)


def fill_the_memory() -> None:
    torch.empty(BYTES, dtype=torch.uint8)


def fail_in_call(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int, fail: Callable[[], Any] = fill_a_device
) -> None:
    """Call `fail` in the call of this number, counted from 1, of a function of a module."""
    real, calls = getattr(module, name), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            fail()
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, failing)


def stops(directory: Path, **changes: Any) -> str:
    """The one line with which training stops."""
    with pytest.raises(TrainingError) as error:
        train(directory, Silent(), **changes)
    assert "\n" not in str(error.value)
    return str(error.value)

"""Memory that runs out, as torch says it."""

from __future__ import annotations

import torch

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

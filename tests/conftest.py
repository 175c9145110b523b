"""What every test runs under: poisoned allocations, no warnings, the Triton interpreter where there is no GPU."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when mmer_fast is imported

# torch.empty and its kind return NaN (or the largest integer): a kernel that leaves an entry unwritten is found.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

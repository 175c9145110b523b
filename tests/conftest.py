"""What every test runs under: fixed seed, poisoned allocations, no warnings, without a GPU the Triton interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when mmer_fast is imported

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(1)

# torch.empty and its kind return NaN (or the largest integer): a kernel that leaves an entry unwritten is found.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run of a test, alone or among others; MMER_TEST_SEED draws different ones."""
    torch.manual_seed(int(os.environ.get("MMER_TEST_SEED", "0")))

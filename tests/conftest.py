"""What every test runs under: fixed seed, poisoned allocations, no warnings, without a GPU the Triton interpreter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch warns that its products may vary
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when mmer_fast is imported

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(1)

# torch.empty and its kind return NaN (or the largest integer): a kernel that leaves an entry unwritten is found.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("MMER_FILL_UNINITIALIZED", "1") != "0"

# Files of minutes start first: a core that has the last of them to itself would let the others wait.
LONGEST = (
    *("kernels/test_cpu_kernels.py", "training/test_distributed_training.py", "kernels/test_gpu_compile.py"),
    *("systems/baselines/test_baselines_train.py", "data/test_formats_train.py", "setup/test_wheel.py", "test_docs.py"),
    *("ablation/test_ablate_command.py", "systems/m3er/test_m3er_training.py", "ablation/test_run_suite.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    rank = {folder / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run of a test, alone or among others; MMER_TEST_SEED draws different ones."""
    torch.manual_seed(int(os.environ.get("MMER_TEST_SEED", "0")))

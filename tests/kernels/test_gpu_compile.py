"""Every GPU kernel compiles ahead of time, within its budget of registers and spilled bytes (gpu_budget.json).

One architecture by default (``MMER_GPU_ARCHITECTURES="sm_80 sm_120"`` or ``all`` names others, ``MMER_GPU_BACKENDS``
the backends); all of them in the library that .ci/cuda-check builds (``MMER_CUDA_LIBRARY``). The budget is a ceiling
that a change of a kernel must not pass unseen: raise it on purpose, with the measured reason in the commit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from gpu_resources import read_library

FOLDER = Path(__file__).parent
BUDGET = json.loads((FOLDER / "gpu_budget.json").read_text())
BACKENDS = os.environ.get("MMER_GPU_BACKENDS", "cuda triton").split()
CHOSEN = os.environ.get("MMER_GPU_ARCHITECTURES", "sm_90")
ARCHITECTURES = list(BUDGET["cuda"]) if CHOSEN == "all" else CHOSEN.split()

MISSING = {
    "cuda": None if shutil.which("nvcc") else "nvcc is not on PATH",
    "triton": None if importlib.util.find_spec("triton") else "Triton is not installed",
}


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[tuple[str, str], Future]]:
    """The result of gpu_resources.py for each backend and architecture; two at a time, each in its own process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_one(backend: str, architecture: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error::UserWarning", str(FOLDER / "gpu_resources.py"), backend, architecture]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    with ThreadPoolExecutor(2) as pool:
        wanted = [(b, a) for b in BACKENDS for a in ARCHITECTURES if MISSING[b] is None]
        yield {each: pool.submit(compile_one, *each) for each in wanted}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_compile_within_their_budget(compilations: dict, backend: str, architecture: str) -> None:
    if MISSING[backend] is not None:
        pytest.skip(MISSING[backend])
    done = compilations[backend, architecture].result()
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)[architecture]
    hold_to_budget(usage, BUDGET[backend][architecture])


def hold_to_budget(usage: dict, budget: dict) -> None:
    assert usage.keys() == budget.keys(), "a kernel came or went: update gpu_budget.json"
    over = {name: used for name, used in usage.items() if any(used[key] > budget[name][key] for key in used)}
    assert not over, f"over the budget of gpu_budget.json: {over}"


def test_every_architecture_of_a_built_library_is_within_its_budget() -> None:
    library = os.environ.get("MMER_CUDA_LIBRARY")
    if library is None:
        pytest.skip("MMER_CUDA_LIBRARY names no library built with CUDA (make cuda-check does)")
    usage = read_library(library)
    assert usage.keys() == BUDGET["cuda"].keys()
    for architecture, kernels in usage.items():
        hold_to_budget(kernels, BUDGET["cuda"][architecture])

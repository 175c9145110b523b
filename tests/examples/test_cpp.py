"""The C++ example builds against the installed torch, runs without Python, and agrees with the functions in Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import cmake_build
import pytest
import torch

import mmer_fast as mf
from mmer_fast import _extension

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
PACKAGE = Path(mf.__file__).parent


@pytest.mark.skipif(_extension.unavailable_reason() is not None, reason="needs the compiled library")
@pytest.mark.skipif(
    torch.version.cuda is not None and shutil.which("nvcc") is None,
    reason="the CMake package of a torch for CUDA needs the CUDA toolkit",
)
def test_the_program_agrees(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))  # the package under test gives the schemas
    program = cmake_build.build(SOURCE, pytestconfig.cache.mkdir("cpp_example")) / "main"
    run = subprocess.run([program, PACKAGE / "_C.abi3.so"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    printed = [[float(x) for x in re.findall(r" (\d\S*)", line)] for line in run.stdout.splitlines()]
    weights, (difference,), (step,), (changed,) = printed
    expected = mf.soft_topk(torch.arange(24.0).sin().view(3, 8), 2)
    torch.testing.assert_close(torch.tensor(weights), expected[0], rtol=0, atol=2e-6)
    assert difference < 1e-6
    assert step == pytest.approx(0.5, abs=1e-6)
    assert changed == 0
    missing = subprocess.run([program, "nowhere.so"], capture_output=True, text=True, timeout=60)
    assert missing.returncode == 1
    assert "nowhere.so" in missing.stderr

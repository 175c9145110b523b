"""Builds a CMake project with what this machine has; skips the test where something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def compiler() -> str | None:
    return next((path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))), None)


def build(source: Path, folder: Path, *definitions: str, target: str = "all") -> Path:
    """Configures and builds `source` in `folder`, and returns `folder`; what is built there already stays."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None or ninja is None or compiler() is None:
        pytest.skip("needs cmake, ninja and a C++ compiler")
    configure = [cmake, "-S", str(source), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={compiler()}", *definitions]
    for command in (configure, [cmake, "--build", str(folder), "--parallel", "2", "--target", target]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return folder


def _tool(name: str) -> str | None:
    """A program beside this interpreter (cmake and ninja are Python packages too), or else on the PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

"""A copy of the source tree to build in, a bare Python, and the wheel, built once. Nothing here needs a network."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
from building import BUILD_VARIABLES, ROOT, SITE_PACKAGES, Python, copy_sources

BUILD_TOOLS = ("setuptools", "_distutils_hack")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A fresh copy of the sources."""
    folder = tmp_path / "tree"
    folder.mkdir()
    return copy_sources(folder)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """A virtual environment with setuptools and without torch."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    tools = folder / "tools"
    tools.mkdir()
    for name in BUILD_TOOLS:
        (tools / name).symlink_to(Path(setuptools.__file__).resolve().parents[1] / name)
    return Python(str(folder / "venv" / "bin" / "python"), (tools,))


@pytest.fixture
def this_python() -> Python:
    return Python(sys.executable)


@pytest.fixture(scope="session")
def import_from(bare_python: Python) -> Callable[[Path], Python]:
    """A Python with all that this one has, but with mmer_fast from a folder: no editable install interferes."""

    def make(folder: Path) -> Python:
        return Python(bare_python.executable, (folder, SITE_PACKAGES))  # of a path entry, .pth files are not read

    return make


@pytest.fixture(scope="session")
def wheel(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of MMER_WHEEL, else one for CPUs, its tree kept between runs so that only what changed is compiled."""
    if "MMER_WHEEL" in os.environ:
        return Path(os.environ["MMER_WHEEL"])
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("needs a C++ compiler")
    kept = copy_sources(pytestconfig.cache.mkdir("wheel_tree"))
    for stale in (*kept.glob("build/lib*"), *kept.glob("build/bdist*"), *kept.glob("*.egg-info")):
        shutil.rmtree(stale)
    return Python(sys.executable).wheel(kept, tmp_path_factory.mktemp("wheel"), MMER_CUDA="0")[0]


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents in a folder."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; its call of setup() does nothing."""
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("mmer_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes an executable shell script."""

    def make(name: str, text: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return make

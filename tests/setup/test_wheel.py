"""The wheel: what is in it, what its library exports and needs, and that it runs.

MMER_WHEEL=dist/NAME.whl tests that one, as `make wheel` does with what it built.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building import Python, package_files, wheel_files


@pytest.fixture
def library(unpacked: Path) -> Path:
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    return unpacked / "mmer_fast" / "_C.abi3.so"


def _symbols(library: Path, kind: str) -> list[str]:
    """Names of the dynamic symbols that are "defined" or "undefined", demangled."""
    command = ["nm", "--dynamic", "--demangle", f"--{kind}-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^[0-9a-f ]*\w ", "", line) for line in lines]  # address, type, name


def test_contents(wheel: Path) -> None:
    assert wheel_files(wheel) == package_files() | {"mmer_fast/_C.abi3.so"}


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name


@pytest.mark.skipif("MMER_WHEEL" not in os.environ, reason="needs a wheel of make wheel (MMER_WHEEL)")
def test_wheel_as_published(wheel: Path) -> None:
    assert f"-manylinux_2_28_{platform.machine()}.whl" in wheel.name
    assert wheel.stat().st_size < 16e6  # with CUDA kernels for every architecture
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert f"Tag: cp310-abi3-manylinux_2_28_{platform.machine()}\n" in archive.read(metadata).decode()


def test_library_exports_its_init_alone(library: Path) -> None:
    assert _symbols(library, "defined") == ["PyInit__C"]


def test_library_needs_only_stable_symbols_of_torch(library: Path) -> None:
    needed = _symbols(library, "undefined")
    assert any("aoti_torch_get_data_ptr" in name for name in needed)
    unstable = [name for name in needed if any(space in name for space in ("at::", "c10::", "torch::", "caffe2::"))]
    assert not unstable


@pytest.mark.skipif(platform.machine() != "x86_64", reason="older symbols are chosen on x86_64 alone")
def test_library_runs_with_every_glibc_that_torch_runs_with(library: Path) -> None:
    newest: dict[str, tuple[int, ...]] = {}
    for name in _symbols(library, "undefined"):
        if version := re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)$", name):
            number = tuple(int(part) for part in version[2].split("."))
            newest[version[1]] = max(newest.get(version[1], ()), number)
    limits = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}  # manylinux_2_28
    assert newest.keys() == limits.keys()
    assert not {name: number for name, number in newest.items() if number > limits[name]}


def test_library_needs_torch_and_the_system_alone(library: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    command = ["readelf", "--dynamic", "--wide", str(library)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in printed
    assert "RUNPATH" not in printed
    needed = {name.partition(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", printed)}
    assert {"libtorch_cpu", "libtorch"} <= needed  # libtorch: see csrc/cuda_stream.h
    system = {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread"}
    loader = {name for name in needed if name.startswith("ld-linux")}
    assert needed <= {"libtorch_cpu", "libtorch"} | system | loader


def test_wheel_runs(unpacked: Path, import_from: Callable[[Path], Python], tmp_path: Path) -> None:
    program = (
        "import json, mmer_fast, torch\n"
        "from mmer_fast import _extension\n"
        "weights = mmer_fast.soft_topk(torch.arange(4.0), 2, backend='cpu')\n"
        "print(json.dumps([mmer_fast.__file__, _extension.build_info(), float(weights.sum())]))\n"
    )
    result = import_from(unpacked).run("-W", "error", "-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    file, build, total = json.loads(result.stdout)
    assert Path(file).is_relative_to(unpacked)
    assert build["torch"] == torch.__version__
    if "MMER_WHEEL" not in os.environ:
        assert build["cuda"] is None
    assert build["isas"][0] == "baseline"
    assert total == pytest.approx(2.0)


def test_deleted_modules_stay_out_of_the_next_wheel(tree: Path, this_python: Python, tmp_path: Path) -> None:
    stale = tree / "build" / "lib" / "mmer_fast" / "deleted.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    wheel, _ = this_python.wheel(tree, tmp_path / "wheel", MMER_PURE_PYTHON="1")
    with zipfile.ZipFile(wheel) as archive:
        assert "mmer_fast/deleted.py" not in archive.namelist()

"""The wheel: what is in it, what its library exports and needs, and that it runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building import ROOT, Python


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
    sources = [path for path in ROOT.glob("mmer_fast/**/*.py") if "__pycache__" not in path.parts]
    expected = {str(path.relative_to(ROOT)) for path in sources}
    expected |= {f"mmer_fast/triton/{path.name}" for path in ROOT.glob("kernels/triton/*.py")}
    expected |= {"mmer_fast/_C.abi3.so", "mmer_fast/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        got = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert got == expected


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name


def test_library_exports_its_init_alone(library: Path) -> None:
    assert _symbols(library, "defined") == ["PyInit__C"]


def test_library_needs_only_stable_symbols_of_torch(library: Path) -> None:
    needed = _symbols(library, "undefined")
    assert any("aoti_torch_get_data_ptr" in name for name in needed)
    unstable = [name for name in needed if any(space in name for space in ("at::", "c10::", "torch::", "caffe2::"))]
    assert not unstable


def test_library_loads_beside_an_older_libgcc(library: Path) -> None:
    assert not [name for name in _symbols(library, "undefined") if "@GCC_1" in name]


def test_library_has_no_run_path(library: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    command = ["readelf", "--dynamic", "--wide", str(library)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in printed
    assert "RPATH" not in printed
    assert "RUNPATH" not in printed
    assert "libpython" not in printed


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
    assert build["cuda"] is None
    assert build["isas"][0] == "baseline"
    assert total == pytest.approx(2.0)


def test_source_distribution_has_all_that_the_build_reads(tree: Path, this_python: Python) -> None:
    shutil.copy2(ROOT / "MANIFEST.in", tree)
    shutil.copy2(ROOT / "CMakeLists.txt", tree)
    result = this_python.run("setup.py", "-q", "sdist", cwd=tree)
    assert result.returncode == 0, result.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        got = {name.partition("/")[2] for name in files.getnames()}
    needed = {path.relative_to(tree) for folder in ("kernels", "csrc") for path in (tree / folder).rglob("*.*")}
    assert {str(path) for path in needed} | {"setup.py", "pyproject.toml", "CMakeLists.txt"} <= got


def test_deleted_modules_stay_out_of_the_next_wheel(tree: Path, this_python: Python, tmp_path: Path) -> None:
    stale = tree / "build" / "lib" / "mmer_fast" / "deleted.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    wheel, _ = this_python.wheel(tree, tmp_path / "wheel", MMER_PURE_PYTHON="1")
    with zipfile.ZipFile(wheel) as archive:
        assert "mmer_fast/deleted.py" not in archive.namelist()

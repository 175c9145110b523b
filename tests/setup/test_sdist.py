"""The source distribution: all that the build reads and nothing else; a wheel comes out of it alone."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from building import ROOT, Python, copy_sources, package_files, wheel_files

GENERATED = {"PKG-INFO", "setup.cfg"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_sources(folder)
    for name in ("MANIFEST.in", "CMakeLists.txt"):
        shutil.copy2(ROOT / name, tree)
    (tree / "tests").mkdir()
    (tree / "tests" / "test_stray.py").touch()  # the default of setuptools takes these
    result = Python(sys.executable).run("setup.py", "-q", "sdist", cwd=tree)
    assert result.returncode == 0, result.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def test_contents(sdist: Path) -> None:
    expected = {"setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "CHANGELOG.md"}
    expected |= {str(path.relative_to(ROOT)) for path in ROOT.glob("LICENSE*")}
    for pattern in ("kernels/**/*", "csrc/**/*", "mmer_fast/**/*.py", "mmer_fast/py.typed"):
        found = (path for path in ROOT.glob(pattern) if path.is_file() and "__pycache__" not in path.parts)
        expected |= {str(path.relative_to(ROOT)) for path in found}
    got = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    got = {name for name in got if not name.startswith("mmer_fast.egg-info/")} - GENERATED
    assert got == {name for name in expected if not name.startswith("mmer_fast/triton/")}  # a link to kernels/triton


def test_every_listed_source_is_there(sdist: Path) -> None:
    sources = json.loads((sdist / "kernels" / "sources.json").read_text())
    listed = [*sources["cpu"], *sources["cpu_per_isa"], *sources["cuda"]]
    assert listed
    assert not [name for name in listed if not (sdist / "kernels" / name).is_file()]


def test_a_wheel_comes_out_of_it_alone(sdist: Path, this_python: Python, tmp_path: Path) -> None:
    wheel, _ = this_python.wheel(sdist, tmp_path / "wheel", MMER_PURE_PYTHON="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel_files(wheel) == package_files()

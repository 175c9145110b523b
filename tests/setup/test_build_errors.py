"""A build that cannot go on says what to do, without a traceback; one that can do with less says so."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from building import Python, assert_fails


def _without_compiler(folder: Path) -> dict[str, str]:
    """Environment variables of a machine with no compiler and no nvcc on the PATH."""
    folder.mkdir()
    return {"PATH": str(folder)}


def test_without_torch(tree: Path, bare_python: Python) -> None:
    result = bare_python.run("setup.py", "build_ext", cwd=tree)
    assert_fails(result, "PyTorch is not installed", "pip install 'torch>=2.10'", "--no-build-isolation")


def test_with_a_torch_too_old(tree: Path, bare_python: Python, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "torch").mkdir(parents=True)
    (old / "torch" / "version.py").write_text("__version__ = '2.9.1+cu130'\ncuda: str = '13.0'\n")
    python = Python(bare_python.executable, (*bare_python.path, old))
    assert_fails(python.run("setup.py", "build_ext", cwd=tree), "needs torch >= 2.10, found 2.9.1+cu130", str(old))


@pytest.mark.parametrize("variable", ["MMER_CUDA", "MMER_PURE_PYTHON"])
def test_a_choice_that_is_none(tree: Path, this_python: Python, variable: str) -> None:
    result = this_python.run("setup.py", "build_ext", cwd=tree, **{variable: "2"})
    assert_fails(result, f"{variable} must be 0 or 1, got '2'")


def test_cuda_without_a_compiler(tree: Path, this_python: Python, tmp_path: Path) -> None:
    variables = _without_compiler(tmp_path / "empty")
    result = this_python.run("setup.py", "build_ext", cwd=tree, MMER_CUDA="1", **variables)
    assert_fails(result, "MMER_CUDA=1, but no C++ compiler was found")


def test_a_compiler_that_is_not_there(tree: Path, this_python: Python) -> None:
    result = this_python.run("setup.py", "build_ext", cwd=tree, CXX="no-such-cxx -pipe", MMER_CUDA="0")
    assert_fails(result, "CXX='no-such-cxx -pipe'", "no program 'no-such-cxx'", "MMER_PURE_PYTHON=1")


def test_a_compiler_of_several_words(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env 'A=b c' g++")
    assert setup_module.find_compiler() == ["env", "A=b c", "g++"]


def test_a_compiler_that_fails(tree: Path, this_python: Python, script: Callable[[str, str], Path]) -> None:
    compiler = script("cxx", 'if [ "$1" = --version ]; then echo "cxx 1.0"; else echo "no memory" >&2; exit 1; fi')
    result = this_python.run("setup.py", "build_ext", cwd=tree, CXX=str(compiler), MMER_CUDA="0")
    assert_fails(result, "no memory", "the compiled library could not be built")


def test_pip_shows_the_message(tree: Path, this_python: Python, tmp_path: Path) -> None:
    command = ["-m", "pip", "wheel", str(tree), "-w", str(tmp_path), "--no-build-isolation", "--no-deps", "--no-index"]
    result = this_python.run(*command, cwd=tmp_path, MMER_CUDA="yes")
    assert_fails(result, "MMER_CUDA must be 0 or 1, got 'yes'")


@pytest.mark.parametrize("why", ["no compiler", "MMER_PURE_PYTHON"])
def test_pure_python(
    why: str, tree: Path, this_python: Python, import_from: Callable[[Path], Python], tmp_path: Path
) -> None:
    variables = _without_compiler(tmp_path / "empty") if why == "no compiler" else {"MMER_PURE_PYTHON": "1"}
    wheel, printed = this_python.wheel(tree, tmp_path / "wheel", **variables)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "reference and Triton backends only" in printed
    assert ("no C++ compiler found" if why == "no compiler" else "MMER_PURE_PYTHON=1") in printed
    if why != "no compiler":
        return  # the same wheel: once is enough
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    program = (
        "import json, warnings, torch, mmer_fast\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    total = float(mmer_fast.soft_topk(torch.arange(4.0), 2).sum())\n"
        "print(json.dumps([mmer_fast.backends()['soft_topk'], total, [str(w.message) for w in caught]]))\n"
    )
    result = import_from(unpacked).run("-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    backends, total, warned = json.loads(result.stdout)
    assert backends["reference"] == "available"
    assert "pure-Python install" in backends["cpu"]
    assert total == pytest.approx(2.0)
    assert len(warned) == 1
    assert "slow reference backend" in warned[0]

"""setup.py's choices about CUDA: whether, from where, for which architectures. No toolkit is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from building import ROOT


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A folder that looks like a CUDA toolkit."""
    home = tmp_path / "cuda"
    for name in ("bin/nvcc", "include/cuda_runtime_api.h"):
        (home / name).parent.mkdir(parents=True)
        (home / name).touch(mode=0o755)
    return home


def _exit_message(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    assert isinstance(caught.value.code, str)  # printed, and exit status 1
    return caught.value.code


@pytest.mark.parametrize(
    ("choice", "torch_cuda", "nvcc", "built"),
    [
        (None, "13.0", True, True),
        (None, "13.0", False, False),
        (None, None, True, False),
        ("0", "13.0", True, False),
        ("1", None, True, True),
    ],
)
def test_when_cuda_is_built(
    setup_module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    choice: str | None,
    torch_cuda: str | None,
    nvcc: bool,
    built: bool,
) -> None:
    found = (Path("/toolkit/bin/nvcc"), Path("/toolkit"))
    monkeypatch.setattr(setup_module, "find_nvcc", lambda: found if nvcc else None)
    if choice is not None:
        monkeypatch.setenv("MMER_CUDA", choice)
    assert setup_module.want_cuda(torch_cuda) == (found if built else None)


def test_cuda_asked_for_without_nvcc(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_module, "find_nvcc", lambda: None)
    monkeypatch.setenv("MMER_CUDA", "1")
    for function, arguments in ((setup_module.want_cuda, ("13.0",)), (setup_module.extensions, ())):
        message = _exit_message(function, *arguments)
        assert "MMER_CUDA=1, but no nvcc was found" in message
        assert "CUDA_HOME" in message


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_where_nvcc_is_found(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, toolkit: Path, variable: str
) -> None:
    monkeypatch.setenv(variable, str(toolkit / "bin" if variable == "PATH" else toolkit))
    assert setup_module.find_nvcc() == (toolkit / "bin" / "nvcc", toolkit)


def test_a_folder_without_headers_is_no_toolkit(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, toolkit: Path
) -> None:
    (toolkit / "include" / "cuda_runtime_api.h").unlink()
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    found = setup_module.find_nvcc()
    assert found is None or found[1] != toolkit


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("9.0", ["9.0"]),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("8.0 8.6, 9.0a", ["8.0", "8.6", "9.0a"]),
        (" 10.0f ", ["10.0f"]),
    ],
)
def test_architectures(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, listed: str, expected: list[str]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert setup_module.cuda_architectures() == expected


def test_default_architectures(setup_module: ModuleType) -> None:
    sources = json.loads((ROOT / "kernels" / "sources.json").read_text())
    *others, newest = sources["cuda_architectures"]
    assert setup_module.cuda_architectures() == [*others, f"{newest}+PTX"]


@pytest.mark.parametrize("listed", ["Hopper", "90", "sm_90", "9.0+SASS", "8.0;;9", "9.0;x"])
def test_bad_architectures(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    message = _exit_message(setup_module.cuda_architectures)
    assert "TORCH_CUDA_ARCH_LIST must look like '8.0;9.0+PTX'" in message


def test_gencode(setup_module: ModuleType) -> None:
    assert setup_module.gencode(["8.6", "9.0a", "12.0+PTX"]) == [
        "-gencode",
        "arch=compute_86,code=sm_86",
        "-gencode",
        "arch=compute_90a,code=sm_90a",
        "-gencode",
        "arch=compute_120,code=sm_120",
        "-gencode",
        "arch=compute_120,code=compute_120",
    ]

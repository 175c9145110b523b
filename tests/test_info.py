from __future__ import annotations

import json
import subprocess
import sys

import numpy
import pytest
import torch

import mmer_fast
from mmer_fast import _extension, info

BUILD = {
    "version": "0.1.0",
    "compiler": "g++ 13.2.0",
    "torch": "2.12.0",
    "torch_target": "2.10",
    "cuda": "13.0",
    "cuda_architectures": ["8.0", "9.0+PTX"],
    "isas": ["baseline", "avx2"],
}


def test_collect_agrees_with_the_package() -> None:
    collected = info.collect()
    assert collected["versions"]["mmer_fast"] == mmer_fast.__version__
    assert collected["versions"]["torch"] == torch.__version__
    assert collected["versions"]["numpy"] == numpy.__version__
    assert collected["build"] == _extension.build_info()
    assert collected["cpu"]["isa"] == _extension.cpu_isa()
    assert collected["operators"] == mmer_fast.backends()
    assert len(collected["gpus"]) == torch.cuda.device_count()
    assert (collected["build"] == {}) == (collected["build_missing"] is not None)


def test_the_command_prints_valid_json() -> None:
    command = [sys.executable, "-W", "error", "-m", "mmer_fast.info", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stderr == ""
    parsed = json.loads(printed.stdout)
    assert set(parsed) == {"versions", "build", "build_missing", "cpu", "gpus", "cuda", "operators"}
    for row in parsed["operators"].values():
        assert row["reference"] == "available"


def test_json_is_what_collect_returns(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_text_has_every_reason(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    printed = capsys.readouterr().out
    for operator, row in mmer_fast.backends().items():
        section = printed.split(f"backends of {operator}\n")[1].split("\n\n")[0].splitlines()
        assert [line.split(maxsplit=1) for line in section] == [[name, reason] for name, reason in row.items()]
    assert torch.__version__ in printed
    assert max(len(line) for line in printed.splitlines()) <= 160


def test_text_of_a_pure_python_install() -> None:
    collected = info.collect()
    collected["build"], collected["build_missing"] = {}, "pure-Python install"
    collected["cpu"]["isa"] = None
    collected["versions"]["triton"] = None
    printed = info.render(collected)
    assert "compiled library\n  none  pure-Python install" in printed
    assert "no compiled kernels" in printed
    assert "not installed" in printed


def test_text_of_a_machine_with_gpus() -> None:
    collected = info.collect()
    collected["build"], collected["cuda"] = BUILD, "13.0"
    collected["gpus"] = [{"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 139.8}] * 2
    printed = info.render(collected)
    assert "GPU 1          NVIDIA H200, compute capability 9.0, 139.8 GiB" in printed
    assert "GPU code   8.0, 9.0+PTX" in printed
    assert "torch >= 2.10 (headers of 2.12.0)" in printed


def test_versions_of_missing_packages_are_none() -> None:
    assert info._version("a-package-that-nobody-has-installed") is None

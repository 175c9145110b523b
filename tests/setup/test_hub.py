"""The kernel for the Hugging Face Hub, loaded from its folder where there is no mmer_fast: as `kernels`, and by it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from building import ROOT

import mmer_fast as mf

pytest.importorskip("triton")
LOAD = """
import importlib.util, json, sys, warnings
from pathlib import Path
import torch
sys.modules["mmer_fast"] = None  # whoever imports it fails
warnings.simplefilter("ignore", RuntimeWarning)  # of the reference, which is what serves here

def load(folder):
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return name, module

def calls(mf):
    scores = torch.linspace(-1, 1, 12).view(2, 6).requires_grad_()
    weights = mf.soft_topk(scores, 2)
    attended = mf.masked_attention(*(scores.view(1, 1, 2, 6),) * 3, lengths=torch.tensor([1]))
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.ones_(layer.weight)
    layer(torch.ones(1, 3)).sum().backward()
    with mf.perturbed(layer, 0.5):
        moved = layer.weight.detach().clone()
    interpreted = mf.soft_topk(scores[:1, :4], 2, backend="triton")
    (gradient,) = torch.autograd.grad((weights * scores.detach()).sum() + attended.sum(), scores)
    return [weights.detach(), attended.detach(), gradient, moved, interpreted.detach()]
"""
BOTH = (
    LOAD
    + """
results = []
for folder in map(Path, sys.argv[2:]):
    name, mf = load(folder)
    assert hasattr(getattr(torch.ops, name), "soft_topk_forward_reference"), name
    results.append(calls(mf))
assert not hasattr(torch.ops.mmer_fast, "soft_topk_forward_reference")
torch.save(results, sys.argv[1])
"""
)


BY_KERNELS = (
    LOAD
    + """
from kernels import get_local_kernel
torch.save(calls(get_local_kernel(Path(sys.argv[2]))), sys.argv[1])
"""
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "hub"
    subprocess.run([sys.executable, str(ROOT / ".ci" / "hub.py"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def variants(hub: Path) -> list[Path]:
    return sorted((hub / "build").iterdir())


def test_two_builds_side_by_side_without_the_package(variants: list[Path], tmp_path: Path) -> None:
    """Each has operators of its own, and computes what the package does."""
    for results in saved_by(BOTH, tmp_path, *variants):
        assert_what_the_package_computes(results)


def test_the_kernels_package_loads_it(hub: Path, tmp_path: Path) -> None:
    """By the line that stands in the kernel's README."""
    pytest.importorskip("kernels")
    assert 'get_local_kernel(Path("build/hub"))' in (hub / "README.md").read_text()
    assert_what_the_package_computes(saved_by(BY_KERNELS, tmp_path, hub))


def saved_by(script: str, tmp_path: Path, *folders: Path) -> list[Any]:
    command = [sys.executable, "-c", script, str(tmp_path / "results.pt"), *map(str, folders)]
    environment = {"TRITON_INTERPRET": "1", "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert run.returncode == 0, run.stderr
    return torch.load(tmp_path / "results.pt")


def assert_what_the_package_computes(results: list[torch.Tensor]) -> None:
    names: dict[str, object] = {}
    exec(LOAD.replace('sys.modules["mmer_fast"] = None', ""), names)
    expected = names["calls"](mf)  # type: ignore[operator]
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_metadata(variants: list[Path]) -> None:
    """Names and versions of the layout, and the digest of every file that is there."""
    assert [folder.name for folder in variants] == ["torch-cpu", "torch-cuda"]
    identities = set()
    for folder in variants:
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["name"] == "mmer-fast"
        assert metadata["id"].isidentifier()
        assert metadata["backend"] == {"type": folder.name.removeprefix("torch-")}
        identities.add(metadata["id"])
        files = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
        assert metadata["digest"]["files"].keys() == files
        for name, digest in metadata["digest"]["files"].items():
            assert base64.b64decode(digest) == hashlib.sha256((folder / name).read_bytes()).digest()
        assert not list(folder.rglob("*.so"))
    assert len(identities) == len(variants)


def test_sources_for_kernel_builder(hub: Path) -> None:
    build = (hub / "build.toml").read_text()
    assert 'name = "mmer-fast"' in build
    assert "[torch-noarch]" in build
    sources = hub / "torch-ext" / "mmer_fast"
    assert not (sources / "_ops.py").exists()  # which kernel-builder generates
    assert "add_op_namespace_prefix" in (sources / "ops" / "_library.py").read_text()


def test_no_operator_is_registered_beside_the_namespace() -> None:
    """What would ignore the namespace of a build: a name spelled out, in Python or C++."""
    spelled = re.compile(r"torch\.ops\.mmer_fast|[\"']mmer_fast::|TORCH_LIBRARY\w*\(mmer_fast")
    files = [*(ROOT / "mmer_fast").rglob("*.py"), *(ROOT / "csrc").iterdir(), *(ROOT / "kernels" / "triton").iterdir()]
    assert not [path.name for path in files if path.is_file() and spelled.search(path.read_text())]

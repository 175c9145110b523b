"""What the tests of the build share: a copy of the sources, an interpreter to run them in, no network."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SITE_PACKAGES = Path(torch.__file__).resolve().parents[1]
# What a developer's shell may set and a test must choose.
BUILD_VARIABLES = ("MMER_CUDA", "MMER_PURE_PYTHON", "TORCH_CUDA_ARCH_LIST", "CXX", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS")


def copy_sources(target: Path) -> Path:
    """What the build reads, with its times, so that ninja sees what has not changed."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("kernels", "csrc", "mmer_fast"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for path in (ROOT / "setup.py", *ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob("LICENSE*")):
        shutil.copy2(path, target)
    return target


def package_files() -> set[str]:
    """The files of the package in an installation without the compiled library, as paths from site-packages."""
    modules = (path for path in ROOT.glob("mmer_fast/**/*.py") if "__pycache__" not in path.parts)
    files = {str(path.relative_to(ROOT)) for path in modules}
    return (
        files | {f"mmer_fast/triton/{path.name}" for path in ROOT.glob("kernels/triton/*.py")} | {"mmer_fast/py.typed"}
    )


def wheel_files(wheel: Path) -> set[str]:
    """The files that a wheel installs, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        files = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    return {name for name in files if ".dist-info/" not in name}


@dataclasses.dataclass
class Python:
    """An interpreter and what it may import."""

    executable: str
    path: tuple[Path, ...] = ()

    def run(self, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, self.path))
        return subprocess.run(
            [self.executable, *arguments], cwd=cwd, env={**environment, **variables}, capture_output=True, text=True
        )

    def wheel(self, tree: Path, folder: Path, **variables: str) -> tuple[Path, str]:
        """Builds the wheel of `tree` into `folder`; its path and what pip printed."""
        command = ["-m", "pip", "wheel", str(tree), "-w", str(folder), "--verbose"]
        offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
        result = self.run(*command, *offline, cwd=tree, **variables)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
        (wheel,) = folder.glob("*.whl")
        return wheel, result.stdout + result.stderr


def assert_fails(result: subprocess.CompletedProcess[str], *messages: str) -> None:
    """It ended with an error that says `messages`, and not with a traceback."""
    printed = result.stdout + result.stderr
    assert result.returncode != 0, printed
    assert "Traceback" not in printed
    for message in messages:
        assert message in printed

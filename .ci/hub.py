"""Writes the operators as a kernel of the Hugging Face Hub, into build/hub: `python .ci/hub.py [FOLDER]`.

    build.toml, README.md        what kernel-builder and people read
    torch-ext/mmer_fast/         the sources for kernel-builder, which adds _ops.py with the namespace of its build
    build/torch-{cpu,cuda}/      the same, built: Python and Triton alone, for every torch >= 2.10, CPU and CUDA

Such a kernel is loaded from any folder, under any name, and beside other versions of itself. So its imports are
relative, and its operators are registered in a namespace of the build, which is its name as a module too.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "mmer_fast"
PACKAGES = ("nn", "ops", "optim", "perturbation")
MODULES = ("__init__.py", "_extension.py", "_version.py")
BACKENDS = ("cpu", "cuda")
VERSION = 0  # of its interface, by the hub's convention: 0 until it is stable
LICENSE = "unknown"  # the project states none yet

OPS = '''"""The namespace of this build's operators."""

import torch

ops = getattr(torch.ops, "{id}")


def add_op_namespace_prefix(name: str) -> str:
    return f"{id}::{{name}}"
'''
NAMESPACE = f'NAMESPACE = "{NAME}"\n'
NAMESPACE_OF_THE_BUILD = """from .._ops import add_op_namespace_prefix  # noqa: E402

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
"""
SAME_MODULE = '''"""The kernel under its own name, for versions of `kernels` that look for it here."""

import sys

from .. import *  # noqa: F403

sys.modules[__name__] = sys.modules[__name__.rpartition(".")[0]]
'''
BUILD = f"""[general]
name = "{NAME.replace("_", "-")}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = {json.dumps(list(BACKENDS))}

[torch-noarch]
"""
README = """# mmer_fast

Soft top-k, attention with soft key weights and adversarial weight perturbation for PyTorch: Python and Triton.

```python
from pathlib import Path

from kernels import get_local_kernel

mf = get_local_kernel(Path("build/hub"))
weights = mf.soft_topk(scores, 3)
```

On CUDA tensors the operators are Triton kernels. On CPU tensors they are the readable reference in PyTorch, which is
slow: `pip install mmer_fast` has compiled kernels for both. Needs torch >= 2.10, Python >= 3.10 and numpy.
"""


def relative(text: str, path: Path) -> str:
    """A module of the package at `path` in it, with imports of the package that do not say its name."""
    dots = "." * len(path.parts)
    text = re.sub(rf"^(\s*)from {NAME}(?:\.([\w.]+))? import ", rf"\1from {dots}\2 import ", text, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(text)):
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        named += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        if any(name.split(".")[0] == NAME for name in named):
            sys.exit(f"{path}:{node.lineno}: an import of {NAME} that cannot be made relative")
    return text


def sources() -> dict[Path, str]:
    """The modules by their place in the kernel."""
    package = ROOT / NAME
    files = {Path(name): package / name for name in MODULES}
    for folder in PACKAGES:
        files |= {path.relative_to(package): path for path in sorted((package / folder).rglob("*.py"))}
    triton = ROOT / "kernels" / "triton"
    files |= {Path("triton") / path.relative_to(triton): path for path in sorted(triton.rglob("*.py"))}
    texts = {place: relative(path.read_text(), place) for place, path in files.items()}
    library = Path("ops/_library.py")
    if NAMESPACE not in texts[library]:
        sys.exit(f"{library} must have the line {NAMESPACE!r}")
    texts[library] = texts[library].replace(NAMESPACE, NAMESPACE_OF_THE_BUILD)
    return texts


def write(folder: Path, texts: dict[Path, str]) -> None:
    for place, text in texts.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def write_variant(folder: Path, texts: dict[Path, str], backend: str) -> None:
    """One build: its identity comes from what is in it, so that no two that differ share a namespace."""
    unique = hashlib.sha256(b"".join(digest(f"{place}\n{text}") for place, text in sorted(texts.items()))).hexdigest()
    identity = f"_{NAME}_{backend}_{unique[:10]}"
    texts = {**texts, Path("_ops.py"): OPS.format(id=identity), Path(NAME) / "__init__.py": SAME_MODULE}
    files = {str(place): base64.b64encode(digest(text)).decode() for place, text in sorted(texts.items())}
    metadata = {
        "name": NAME.replace("_", "-"),
        "id": identity,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    write(folder, {**texts, Path("metadata.json"): json.dumps(metadata, indent=2) + "\n"})


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    texts = sources()
    write(folder, {Path("build.toml"): BUILD, Path("README.md"): README})
    write(folder / "torch-ext" / NAME, texts)
    for backend in BACKENDS:
        write_variant(folder / "build" / f"torch-{backend}", texts, backend)
    print(f"built: {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub")

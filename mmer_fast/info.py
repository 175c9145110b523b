"""What is installed, what was built, and what can run here: ``python -m mmer_fast.info [--json]``.

The first thing to put into a bug report. Nothing here starts a GPU context beyond asking for the devices' names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mmer_fast import _extension
from mmer_fast._version import __version__
from mmer_fast.ops._backends import backends


def collect() -> dict[str, Any]:
    """Everything that the command prints, as JSON-compatible values.

    Returns:
        A dictionary with

        - ``versions``: of mmer_fast, python, torch, numpy and triton (None where a package is not installed);
        - ``build``: what the compiled library was built with (`mmer_fast._extension.build_info`), empty without one;
        - ``build_missing``: why there is no compiled library, or None;
        - ``cpu``: ``isa``, the CPU variant in use or None, ``threads`` of torch, ``machine``;
        - ``gpus``: a dictionary ``name``, ``capability`` ("9.0"), ``memory_gib`` for each CUDA device;
        - ``cuda``: the CUDA version of torch, or None;
        - ``operators``: ``{operator: {backend: "available" | the reason why not}}``.
    """
    return {
        "versions": {
            "mmer_fast": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": _version("numpy"),
            "triton": _version("triton"),
        },
        "build": _extension.build_info(),
        "build_missing": _extension.unavailable_reason(),
        "cpu": {"isa": _extension.cpu_isa(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "gpus": list(_gpus()),
        "cuda": torch.version.cuda,
        "operators": backends(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[dict[str, Any]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        yield {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }


def render(info: dict[str, Any]) -> str:
    """`info` (of `collect`) as plain text: a section each, a line an entry."""
    build = info["build"]
    sections = {
        "versions": [(name, version or "not installed") for name, version in info["versions"].items()],
        "compiled library": [
            ("compiler", build["compiler"]),
            ("built for", f"torch >= {build['torch_target']} (headers of {build['torch']})"),
            ("CUDA", f"nvcc {build['cuda']}" if build["cuda"] else "not built (MMER_CUDA=1 at build time)"),
            ("GPU code", ", ".join(build["cuda_architectures"]) or "none"),
            ("CPU code", ", ".join(build["isas"])),
        ]
        if build
        else [("none", info["build_missing"])],
        "this machine": [
            ("CPU", f"{info['cpu']['machine']}, {info['cpu']['isa'] or 'no compiled'} kernels"),
            ("threads", str(info["cpu"]["threads"])),
            ("CUDA of torch", info["cuda"] or "none (a CPU build of torch)"),
            *(
                (f"GPU {i}", f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB")
                for i, gpu in enumerate(info["gpus"])
            ),
        ],
    }
    if not info["gpus"]:
        sections["this machine"].append(("GPU", "none that torch sees"))
    for operator, row in info["operators"].items():
        sections[f"backends of {operator}"] = list(row.items())
    blocks = []
    for title, lines in sections.items():
        width = max(len(name) for name, _ in lines)
        blocks.append("\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines)]))
    return "\n\n".join(blocks)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints `collect` as text, or as JSON with ``--json``; `arguments` None takes the command line."""
    parser = argparse.ArgumentParser(prog="python -m mmer_fast.info", description="What was built, what can run.")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else render(info))


if __name__ == "__main__":
    main()

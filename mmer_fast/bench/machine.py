"""What a result is worth depends on where it was measured: the machine, the versions, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import mmer_fast as mf
from mmer_fast import _extension

ROOT = Path(__file__).resolve().parents[2]


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_generation() -> str | None:
    """Family and model of the processor, e.g. ``26.2``: every AMD EPYC may bear the same name."""
    return ".".join(filter(None, (_cpuinfo("cpu family"), _cpuinfo("model")))) or None


def _cpuinfo(key: str) -> str | None:
    """What Linux says of the first processor under `key`."""
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else None


def describe(device: str, copy_gbps: float) -> dict[str, Any]:
    """The machine, without names of hosts or folders."""
    machine: dict[str, Any] = {
        "cpu": cpu_model(),
        "cpu_generation": cpu_generation(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _extension.cpu_isa(),
        "gpu": None,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "copy_gbps": round(copy_gbps, 1),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = properties.name
        machine["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        machine["gpu_multiprocessors"] = properties.multi_processor_count
    return machine


def provenance(packages: Iterable[str] = ()) -> dict[str, Any]:
    """When, at which commit and with which versions something is measured."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"created": created, "commit": commit(), "versions": versions(packages)}


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Version of torch, triton and each of `packages`; None where it is not installed."""
    result: dict[str, str | None] = {
        "mmer_fast": mf.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in ("triton", *packages):
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result[package] = None
    return result


def commit() -> str | None:
    """Short git commit of the working tree, ``+`` where tracked files differ from it; None outside of a checkout."""
    if not (ROOT / ".git").exists():  # an installation, perhaps inside another repository
        return None
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def slug(machine: dict[str, Any]) -> str:
    """A short name of the machine for a file name, e.g. ``xeon-2-50ghz-avx512-2t`` or ``nvidia-h200``."""
    text = machine["gpu"]
    if text is None:
        model = re.sub(r"\((R|TM|C)\)|\b(Intel|AMD|CPU|Processor|Core)\b|@", " ", machine["cpu"], flags=re.IGNORECASE)
        text = f"{model} {machine['isa'] or 'pure'} {machine['threads']}t"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

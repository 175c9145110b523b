"""Loads the compiled library ``mmer_fast._C`` once, and remembers why where it cannot be had."""

from __future__ import annotations

import json
import os
from types import ModuleType
from typing import Any

import torch  # noqa: F401  libtorch must be in the process before _C, whose symbols it resolves

_ISAS = ("baseline", "avx2", "avx512")
if (os.environ.get("MMER_FAST_CPU_ISA") or _ISAS[0]) not in _ISAS:
    raise ValueError(f"MMER_FAST_CPU_ISA must be one of {', '.join(_ISAS)}, got {os.environ['MMER_FAST_CPU_ISA']!r}")

_module: ModuleType | None = None
_reason: str | None = None

try:
    from mmer_fast import _C as _module  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    missing = "No module named" in str(error) or "cannot import name '_C'" in str(error)
    _reason = (
        "the compiled library mmer_fast._C is not part of this installation (pure-Python install)"
        if missing
        else f"the compiled library mmer_fast._C does not load: {error}"
    )


def unavailable_reason() -> str | None:
    """Why the compiled library is not there, or None if it is."""
    return _reason


def build_info() -> dict[str, Any]:
    """What the compiled library was built with; empty where there is none.

    Keys: ``version``, ``compiler``, ``torch`` (headers built against), ``torch_target`` (lowest torch that loads it),
    ``cuda`` (nvcc version or None), ``cuda_architectures`` (list), ``isas`` (CPU variants in the binary).
    """
    return json.loads(_module.build_info()) if _module is not None else {}


def cpu_isa() -> str | None:
    """The CPU variant in use (``"baseline"``, ``"avx2"``, ``"avx512"``), or None without the compiled library."""
    return _module.cpu_isa() if _module is not None else None

"""Which backend serves a call.

Four backends implement every operator with the same semantics:

========== ======================================== ==========================================
reference  readable PyTorch, float64 inside         every device
cpu        C++ (AVX-512, AVX2 or baseline)          CPU tensors
cuda       CUDA C++                                 CUDA tensors
triton     Triton                                   CUDA tensors; CPU under ``TRITON_INTERPRET=1``
========== ======================================== ==========================================

The choice, first match wins: the ``backend=`` argument, `use_backend`, the environment variable
``MMER_FAST_BACKEND``, and else the fastest that can run, by a table of the operator. An explicit
choice that cannot serve raises `BackendUnavailable` with every backend's reason; the automatic choice falls back to the
reference with one warning.
The choice depends on the device type, the dtype and sizes alone, so it never breaks a ``torch.compile`` graph.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from mmer_fast import _extension

BACKENDS = ("reference", "cpu", "cuda", "triton")
OPERATORS = ("soft_topk", "masked_attention", "packed_attention", "perturbation")
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# Attention takes Triton until a GPU has measured which of the two is faster (benchmarks/results/).
_ATTENTION = {**_PREFERENCE, "cuda": ("triton", "cuda")}
_PREFERENCE_OF = {"masked_attention": _ATTENTION, "packed_attention": _ATTENTION}


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot serve this call; the message has the reason of each backend."""


class _Choice:
    """Process-wide state; attributes and not ContextVars, which torch.compile cannot trace."""

    forced: str | None = None  # use_backend
    environment: str | None = os.environ.get("MMER_FAST_BACKEND") or None
    checked: bool = os.environ.get("MMER_FAST_CHECKED", "0") not in ("", "0")
    warned: set[tuple[str, str]] = set()  # noqa: RUF012  one process, one set


_INTERPRETER = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _reason(backend: str, device: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if device == "cpu" and not _INTERPRETER:
            return "Triton runs on CPU tensors only in its interpreter (TRITON_INTERPRET=1 before import)"
        return None
    if backend != device:
        return f"serves {backend} tensors, not {device} tensors"
    if _extension.unavailable_reason() is not None:
        return _extension.unavailable_reason()
    if backend == "cuda" and not _extension.build_info()["cuda"]:
        return "the compiled library was built without CUDA (set MMER_CUDA=1 at build time)"
    return None


# Filled at import: a call, traced or not, only looks up. Where there is a CUDA tensor there is a CUDA device.
_REASONS = {(backend, device): _reason(backend, device) for backend in BACKENDS for device in ("cpu", "cuda")}


def unavailable_reason(backend: str, device: str) -> str | None:
    """Why `backend` cannot serve tensors on `device` (a device type), or None if it can."""
    if backend == "reference":
        return None
    return _REASONS.get((backend, device), f"no kernel for {device} tensors")


def backends() -> dict[str, dict[str, str]]:
    """What can run here: for every operator and backend ``"available"`` or the reason why not.

    A backend is judged on the device that it is made for: ``triton`` on CUDA, or on the CPU under its interpreter.

    Returns:
        A dictionary of operators, each a dictionary from the backend's name to ``"available"`` or the reason.
    """
    home = {"reference": "cpu", "cpu": "cpu", "cuda": "cuda", "triton": "cpu" if _INTERPRETER else "cuda"}
    row = {}
    for name in BACKENDS:
        reason = unavailable_reason(name, home[name])
        if reason is None and home[name] == "cuda" and not torch.cuda.is_available():
            reason = "torch sees no CUDA device"
        row[name] = reason or "available"
    return {operator: dict(row) for operator in OPERATORS}


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Every operator inside the ``with`` block runs on one backend.

    Process-wide, not per thread. An explicit ``backend=`` argument still wins.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None is the automatic choice.

    Raises:
        ValueError: another name.
    """
    if name is not None:
        _check_name(name, "name")
    previous, _Choice.forced = _Choice.forced, name
    try:
        yield
    finally:
        _Choice.forced = previous


@contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Inside the ``with`` block operators also check the *values* of their inputs (a scan, and on CUDA a host sync).

    What would give a NaN row then raises ValueError with the row, and so does a key weight outside [0, 1]; not under
    ``torch.compile`` or a transform of ``torch.func``, where no value is read. ``MMER_FAST_CHECKED=1`` turns it on for
    the whole process.
    """
    previous, _Choice.checked = _Choice.checked, enabled
    try:
        yield
    finally:
        _Choice.checked = previous


def is_checked() -> bool:
    return _Choice.checked


def _check_name(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def _explain(device: str, cannot: Mapping[str, str]) -> str:
    reasons = {name: unavailable_reason(name, device) or cannot.get(name, "can run") for name in BACKENDS}
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _warn_fallback(operator: str, device: str, cannot: Mapping[str, str]) -> None:
    if (operator, device) in _Choice.warned:
        return
    _Choice.warned.add((operator, device))
    warnings.warn(
        f"mmer_fast.{operator} runs on the slow reference backend for {device} tensors ({_explain(device, cannot)}). "
        "Say backend='reference' to choose it without this warning.",
        RuntimeWarning,
        stacklevel=4,
    )


_NOTHING: Mapping[str, str] = {}


def select(
    operator: str, device: str, explicit: str | None, cannot: Mapping[str, str] = _NOTHING, *, quiet: bool = False
) -> str:
    """The backend for a call of `operator` on tensors of `device`; see the module's docstring for the rule.

    Args:
        cannot: backends that cannot serve this call, with the reason.
        quiet: falling back to the reference is what the documentation promises, and needs no warning.

    Raises:
        TypeError, ValueError: what is no backend's name.
        BackendUnavailable: the backend that was asked for cannot run.
    """
    if explicit is not None and not isinstance(explicit, str):
        raise TypeError(f"backend must be a str or None, got {type(explicit).__name__}")
    wanted = explicit or _Choice.forced or _Choice.environment
    if wanted is not None:
        if explicit is not None:
            source = "backend"
        else:
            source = "use_backend" if _Choice.forced is not None else "MMER_FAST_BACKEND"
        _check_name(wanted, source)
        if unavailable_reason(wanted, device) is not None or wanted in cannot:
            raise BackendUnavailable(
                f"{operator}: {source}={wanted!r} cannot serve {device} tensors. {_explain(device, cannot)}"
            )
        return wanted
    for name in _PREFERENCE_OF.get(operator, _PREFERENCE).get(device, ()):
        if unavailable_reason(name, device) is None and name not in cannot:
            return name
    if not quiet and not torch.compiler.is_compiling():
        _warn_fallback(operator, device, cannot)
    return "reference"

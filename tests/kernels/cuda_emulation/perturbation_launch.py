"""The launchers of kernels/cuda/perturbation.h on the emulator, with guard pages, by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from guarded_memory import GuardPages
from torch import Tensor

GLOBAL, TENSOR, AWP = 0, 1, 2
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STORED = {1: np.dtype(np.uint8), 2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}


class _Tensor(ctypes.Structure):
    """PerturbationTensor."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "stash")),
        ("n", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("weight_dtype", "grad_dtype")),
    )


class _Args(ctypes.Structure):
    """PerturbationArgs."""

    _fields_ = (
        ("tensors", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("scope", ctypes.c_int),
        ("adaptive", ctypes.c_bool),
        ("radius", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in ("given_norms", "given_weight_norms", "norms", "weight_norms", "factors")
        ),
    )


@dataclass
class Perturbed:
    weights: list[Tensor]
    stash: list[Tensor]
    norms: Tensor
    weight_norms: Tensor
    factors: Tensor


class Machine:
    """Runs the kernels; weights and gradients are copies, results are NaN at first."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.perturbation_workspace.restype = ctypes.c_int64
        self._pages = GuardPages()

    @property
    def tensors(self) -> int:
        """Whose table fits into one launch."""
        return self._library.perturbation_tensors()

    @property
    def launches(self) -> int:
        """Until now."""
        return self._library.emulation_launches()

    def order(self, seed: int, multiprocessors: int) -> None:
        """How warps follow each other, and how many blocks share the work."""
        self._library.emulation_seed(ctypes.c_uint64(seed))
        self._library.emulation_multiprocessors(multiprocessors)

    def empty(self, n: int, dtype: torch.dtype, slack: int = 0) -> Tensor:
        """(n,), which ends `slack` entries before a page without access."""
        if n == 0:
            return torch.empty(0, dtype=dtype)
        return torch.from_numpy(self._pages((n + slack,), _STORED[dtype.itemsize])).view(dtype)[:n]

    def guarded(self, x: Tensor, slack: int = 0) -> Tensor:
        copy = self.empty(x.numel(), x.dtype, slack)
        copy.view(torch.uint8).copy_(x.reshape(-1).view(torch.uint8))
        return copy

    def norm(
        self, grads: Sequence[Tensor], scope: int, weights: Sequence[Tensor] | None = None, adaptive: bool = False
    ) -> tuple[Tensor, Tensor]:
        grads = [self.guarded(g) for g in grads]
        weights = None if weights is None else [self.guarded(w) for w in weights]
        tensors = _table(grads if weights is None else weights, grads, None, known=weights is not None)
        args, results = self._args(tensors, len(grads), scope, adaptive)
        args.factors = None
        self._run("perturbation_norm", args)
        return results[0], results[1]

    def perturb(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        radius: float,
        scope: int,
        adaptive: bool = False,
        norms: Tensor | None = None,
        weight_norms: Tensor | None = None,
        slack: tuple[int, int, int] = (0, 0, 0),
    ) -> Perturbed:
        """slack: of weights, gradients and stash, which moves their beginnings off the multiples of 16 bytes."""
        moved = [self.guarded(w, slack[0]) for w in weights]
        grads = [self.guarded(g, slack[1]) for g in grads]
        stash = [self.empty(w.numel(), w.dtype, slack[2]) for w in weights]
        args, results = self._args(_table(moved, grads, stash), len(moved), scope, adaptive)
        args.radius = radius
        norms, weight_norms = (None if x is None else self.guarded(x) for x in (norms, weight_norms))
        args.given_norms, args.given_weight_norms = _pointer(norms), _pointer(weight_norms)
        self._run("perturbation_apply", args)
        return Perturbed(moved, stash, *results)

    def restore(self, perturbed: Perturbed) -> None:
        tensors = _table(perturbed.weights, perturbed.weights, perturbed.stash)
        count = len(perturbed.weights)
        status = self._library.perturbation_restore(ctypes.byref(tensors), ctypes.c_int64(count))
        assert status == 0, f"perturbation_restore: error {status}"

    def workspace(self, sizes: Sequence[int], scope: int) -> int:
        """Bytes, for tensors that need not be there."""
        tensors = (_Tensor * len(sizes))(*(_Tensor(n=n) for n in sizes))
        return self._library.perturbation_workspace(ctypes.byref(self._args(tensors, len(sizes), scope, False)[0]))

    def _args(self, tensors: ctypes.Array, count: int, scope: int, adaptive: bool) -> tuple[_Args, list[Tensor]]:
        groups = 1 if scope == GLOBAL else count
        sizes = (groups, count if scope == AWP else 0, groups)
        results = [self.empty(n, torch.float64).fill_(torch.nan) for n in sizes]
        args = _Args(ctypes.addressof(tensors), count, scope, adaptive)
        args.norms, args.weight_norms, args.factors = (_pointer(x) for x in results)
        args.kept = tensors  # alive as long as the address of it
        return args, results

    def _run(self, name: str, args: _Args) -> None:
        size = self._library.perturbation_workspace(ctypes.byref(args))
        assert size >= 8
        workspace = self.empty(size // 8, torch.float64)
        status = getattr(self._library, name)(ctypes.byref(args), ctypes.c_void_p(workspace.data_ptr()))
        assert status == 0, f"{name}: error {status}"


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None or x.numel() == 0 else x.data_ptr()


def _table(
    weights: Sequence[Tensor], grads: Sequence[Tensor], stash: Sequence[Tensor] | None, known: bool = True
) -> ctypes.Array:
    """known: False where there are no weights, and `weights` holds the gradients."""
    return (_Tensor * len(weights))(*(
        _Tensor(
            _pointer(w) if known else None,
            _pointer(g),
            None if stash is None else _pointer(stash[i]),
            w.numel(),
            DTYPES[w.dtype],
            DTYPES[g.dtype],
        )
        for i, (w, g) in enumerate(zip(weights, grads, strict=True))
    ))  # fmt: skip

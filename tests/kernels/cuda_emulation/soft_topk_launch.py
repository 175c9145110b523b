"""The launchers of kernels/cuda/soft_topk.h on the emulator, by ctypes: a module for `run_cpu_kernels.Run`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
_SEEDS = (1, 2)  # of the order of the warps


class _Rows(ctypes.Structure):
    """SoftTopKRows."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("rows", "cols")),
        ("scores", ctypes.c_void_p),
        ("scores_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("lengths", "mask")),
        ("mask_stride", ctypes.c_int64),
        ("tau", ctypes.c_void_p),
        ("tau_value", ctypes.c_double),
        ("largest", ctypes.c_bool),
    )


class _Forward(ctypes.Structure):
    """SoftTopKForwardArgs."""

    _fields_ = (
        ("rows", _Rows),
        ("k", ctypes.c_void_p),
        ("k_value", ctypes.c_double),
        ("sinkhorn_iterations", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weights", "threshold", "certificate")),
    )


class _Backward(ctypes.Structure):
    """SoftTopKBackwardArgs."""

    _fields_ = (
        ("rows", _Rows),
        ("grad_weights", ctypes.c_void_p),
        ("grad_weights_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("threshold", "grad_threshold", "grad_scores", "grad_k", "grad_tau")),
    )


class Machine:
    """Runs each kernel twice with its warps in another order: the results must be the same bits.

    Attributes:
        multiprocessors: for each row of a call. So many blocks may share a long one, the number rounded down to a power
            of two.
    """

    def __init__(self, library: Path, multiprocessors: int = 1, resident_cluster: int = 16) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_resident_cluster(ctypes.c_uint(resident_cluster))
        self.multiprocessors = multiprocessors

    @property
    def ranks(self) -> int:
        """The blocks of a cluster of the last launch."""
        return self._library.emulation_last_cluster()

    def soft_topk_forward(
        self,
        scores: np.ndarray,
        weights: np.ndarray,
        threshold: np.ndarray,
        certificate: np.ndarray,
        *,
        k: float | np.ndarray,
        sinkhorn_iterations: int,
        begin: int,
        end: int,
        **options: Any,
    ) -> None:
        """Rows `begin` to `end` of arrays like those of `cpu_kernel_cases.Inputs`."""
        part = slice(begin, end)
        args = _Forward(_rows(scores, part, **options))
        args.k, args.k_value = _number(k, part)
        args.sinkhorn_iterations = sinkhorn_iterations
        self._run("soft_topk_forward", args, end - begin, weights=weights[part], threshold=threshold[part],
                  certificate=certificate[part])  # fmt: skip

    def soft_topk_backward(
        self,
        grad_weights: np.ndarray,
        scores: np.ndarray,
        threshold: np.ndarray,
        grad_scores: np.ndarray,
        grad_k: np.ndarray,
        grad_tau: np.ndarray,
        *,
        grad_threshold: np.ndarray | None,
        begin: int,
        end: int,
        **options: Any,
    ) -> None:
        part = slice(begin, end)
        args = _Backward(_rows(scores, part, **options))
        args.grad_weights, args.grad_weights_stride = _matrix(grad_weights, part)
        args.threshold, args.grad_threshold = _pointer(threshold, part), _pointer(grad_threshold, part)
        self._run("soft_topk_backward", args, end - begin, grad_scores=grad_scores[part], grad_k=grad_k[part],
                  grad_tau=grad_tau[part])  # fmt: skip

    def _run(self, name: str, args: ctypes.Structure, rows: int, **results: np.ndarray) -> None:
        self._library.emulation_multiprocessors(self.multiprocessors * rows)
        for key, array in results.items():
            setattr(args, key, array.ctypes.data)
        runs = []
        for seed in _SEEDS:
            self._library.emulation_seed(ctypes.c_uint64(seed))
            status = getattr(self._library, name)(ctypes.byref(args))
            assert status == 0, f"{name}: error {status}"
            runs.append([array.tobytes() for array in results.values()])
        assert runs[0] == runs[1], f"{name}: the bits depend on the order of the warps"


def _rows(
    scores: np.ndarray,
    part: slice,
    *,
    dtype: str,
    largest: bool,
    tau: float | np.ndarray,
    lengths: np.ndarray | None,
    mask: np.ndarray | None,
) -> _Rows:
    rows = _Rows(DTYPES[dtype], part.stop - part.start, scores.shape[1], *_matrix(scores, part))
    rows.lengths = _pointer(lengths, part)
    rows.mask, rows.mask_stride = (None, 0) if mask is None else _matrix(mask, part)
    rows.tau, rows.tau_value = _number(tau, part)
    rows.largest = largest
    return rows


def _pointer(array: np.ndarray | None, part: slice) -> int | None:
    return None if array is None else array[part].ctypes.data


def _matrix(array: np.ndarray, part: slice) -> tuple[int, int]:
    """Pointer and stride of rows."""
    return array[part].ctypes.data, array.strides[0] // array.itemsize


def _number(value: float | np.ndarray, part: slice) -> tuple[int | None, float]:
    """Pointer to a number for each row, or none and the number for all."""
    return (_pointer(value, part), 0.0) if isinstance(value, np.ndarray) else (None, value)

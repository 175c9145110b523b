"""Plain values out of pickles: small classes stand where a pickle names NumPy's, so that no function of NumPy's
own unpickling ever runs on a file's arguments; what they hold becomes arrays and builtins afterwards.

NumPy 1 and 2 spell the names differently (``numpy.core``, ``numpy._core``); both are known, and so is what
Python 2 wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmer_fast.data.errors import DataError

_PLAIN = re.compile(r"[biuf]\d+|[SU]\d+|O\d*")


class PickledDtype:
    """Stands for ``numpy.dtype``: booleans, integers, floats, strings, and objects, which become lists."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not isinstance(code, str) or not _PLAIN.fullmatch(code):
            raise DataError(f"arrays of dtype {str(code)[:40]!r} are refused; expected numbers or strings")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1])


class PickledArray:
    """Stands for ``numpy.ndarray``; `value` is an array, or nested lists for an array of objects."""

    value: Any

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran_order, data = state
        if not isinstance(dtype, PickledDtype):
            raise DataError("array state: expected a dtype")
        if dtype.value.hasobject:
            self.value = _nested(data, shape, fortran_order)
        else:
            self.value = _array(_as_bytes(data), dtype, shape, "F" if fortran_order else "C")


class PickledNamespace:
    """Stands for ``argparse.Namespace``, in which HHMPN keeps its settings."""

    value: dict

    def __init__(self) -> None:
        self.value = {}

    def __setstate__(self, state: dict) -> None:
        self.value = dict(state)


def pickled_array(subtype: type, shape: tuple, code: bytes) -> PickledArray:
    if subtype is not PickledArray:
        raise DataError(f"array type {subtype!r} is refused; expected numpy.ndarray")
    return PickledArray()


def pickled_buffer(data: bytes, dtype: PickledDtype, shape: tuple, order: str) -> PickledArray:
    if not isinstance(dtype, PickledDtype) or dtype.value.hasobject:
        raise DataError("array buffer: expected numbers or strings")
    result = PickledArray()
    result.value = _array(_as_bytes(data), dtype, shape, order)
    return result


def pickled_scalar(dtype: PickledDtype, data: bytes) -> bool | int | float | str | bytes:
    if dtype.value.hasobject:
        raise DataError("scalars of dtype object are refused; expected numbers or strings")
    return np.frombuffer(_as_bytes(data), dtype.value, count=1)[0].item()


NUMPY_NAMES: list[tuple[Callable, str]] = [(PickledDtype, "numpy.dtype"), (PickledArray, "numpy.ndarray")]
for _core in ("numpy.core", "numpy._core"):
    NUMPY_NAMES += [
        (pickled_array, f"{_core}.multiarray._reconstruct"),
        (pickled_scalar, f"{_core}.multiarray.scalar"),
        (pickled_buffer, f"{_core}.numeric._frombuffer"),
    ]
ALLOWED_NAMES: list[tuple[Callable, str]] = [*NUMPY_NAMES, (PickledNamespace, "argparse.Namespace")]


def to_plain(value: Any) -> Any:
    """The same value of dicts, lists, tuples, sets, NumPy arrays, strings, bytes, numbers, booleans and None.

    Shared parts stay shared, so the result is never larger than what was unpickled.

    Raises:
        DataError: an object of another kind, or one that contains itself.
    """
    return _to_plain(value, {})


def _to_plain(value: Any, known: dict[int, Any]) -> Any:
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return value
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if id(value) in known:
        if known[id(value)] is _UNFINISHED:
            raise DataError("an object that contains itself is refused")
        return known[id(value)]
    known[id(value)] = _UNFINISHED
    known[id(value)] = result = _container(value, known)
    return result


_UNFINISHED = object()


def _container(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, PickledArray):
        return _to_plain(value.value, known) if isinstance(value.value, list) else value.value
    if isinstance(value, PickledNamespace):
        return _to_plain(value.value, known)
    if isinstance(value, dict):
        return {key: _to_plain(item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_to_plain(item, known) for item in value])
    if isinstance(value, (set, frozenset)):
        return {_to_plain(item, known) for item in value}
    raise DataError(f"objects of {type(value).__name__} are refused; expected tensors, arrays and builtin containers")


def _as_bytes(data: Any) -> bytes:
    if isinstance(data, str):  # Python 2's str, read as latin1
        return data.encode("latin1")
    if not isinstance(data, (bytes, bytearray)):
        raise DataError(f"array data: expected bytes; got {type(data).__name__}")
    return bytes(data) if isinstance(data, bytearray) else data


def _array(data: bytes, dtype: PickledDtype, shape: tuple, order: str) -> np.ndarray:
    if order not in ("C", "F"):
        raise DataError(f"array order: expected C or F; got {str(order)[:40]!r}")
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C")


def _nested(items: Any, shape: tuple, fortran_order: bool) -> list:
    """An array of objects as nested lists."""
    if not isinstance(items, list):
        raise DataError(f"array data: expected a list of objects; got {type(items).__name__}")
    flat = np.empty(len(items), dtype=object)
    flat[:] = items
    nested = flat.reshape(shape, order="F" if fortran_order else "C").tolist()
    if not isinstance(nested, list):
        raise DataError("array of objects: expected at least one axis")
    return nested

"""``torch.load`` for files from anywhere: tensors, numeric arrays and builtin containers, nothing else.

A ``.pt`` file is a pickle, and a pickle names functions to call. ``weights_only=True`` refuses every name
outside its own list. The few names with which NumPy pickles an array are added to that list, but lead to the
small classes below, which take the bytes as a buffer of a numeric dtype: no function of NumPy's own
unpickling ever runs on a file's arguments. NumPy 1 and 2 spell the names differently (``numpy.core``,
``numpy._core``); both are known.

A file that cannot be loaded is scanned, not executed, for the names it asks for; the error states them.
"""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from mmer_fast.data.errors import DataError

_NUMERIC = re.compile(r"[biuf]\d+")


class _PickledDtype:
    """Stands for ``numpy.dtype`` in a pickle; numeric dtypes only."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not isinstance(code, str) or not _NUMERIC.fullmatch(code):
            raise DataError(f"arrays of dtype {code!r} are refused; expected booleans, integers or floats")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1])


class _PickledArray:
    """Stands for ``numpy.ndarray`` in a pickle."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran_order, data = state
        if not isinstance(dtype, _PickledDtype) or not isinstance(data, bytes):
            raise DataError("array state: expected a numeric dtype and bytes")
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran_order else "C")


def _pickled_array(subtype: type, shape: tuple, code: bytes) -> _PickledArray:
    if subtype is not _PickledArray:
        raise DataError(f"array type {subtype!r} is refused; expected numpy.ndarray")
    return _PickledArray()


def _pickled_scalar(dtype: _PickledDtype, data: bytes) -> bool | int | float:
    return np.frombuffer(data, dtype.value, count=1)[0].item()


_ALLOWED: list[tuple[Callable, str]] = [
    (_PickledDtype, "numpy.dtype"),
    (_PickledArray, "numpy.ndarray"),
    (_pickled_array, "numpy.core.multiarray._reconstruct"),
    (_pickled_array, "numpy._core.multiarray._reconstruct"),
    (_pickled_scalar, "numpy.core.multiarray.scalar"),
    (_pickled_scalar, "numpy._core.multiarray.scalar"),
]
# What every file of tensors and arrays names: left out of the names in an error, without any say in loading.
_ORDINARY = re.compile(
    r"torch\._utils\._rebuild_tensor\w*|torch\.\w+Storage|collections\.OrderedDict|_codecs\.encode|"
    + "|".join(re.escape(name) for _, name in _ALLOWED)
)


def load_plain(path: Path) -> Any:
    """The object in a file written by ``torch.save``, zip or legacy format, tensors as NumPy arrays.

    Returns:
        Dicts, lists, tuples, NumPy arrays, strings, numbers, booleans and None. Arrays may be read-only.

    Raises:
        DataError: the file names a class or function that is not plain data (the message names it; nothing of
            it was imported or called), is truncated, or was not written by ``torch.save``.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return _to_numpy(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged pickle can raise anything, and all of it means: this file is unusable
        refused = list(dict.fromkeys(name for name in _names_in(path) if not _ORDINARY.fullmatch(name)))
        if refused:
            message = f"refused, since it asks for {', '.join(refused)}; expected only tensors and numeric arrays"
        elif isinstance(error, DataError):
            message = str(error)
        else:
            message = f"not a readable torch.save file ({type(error).__name__}: {_reason(error)})"
        raise DataError(f"{path}: {message}") from error


def _to_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(value, _PickledArray):
        return value.value
    if isinstance(value, dict):
        return {key: _to_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_to_numpy, value))
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return value
    raise DataError(f"objects of {type(value).__name__} are refused; expected tensors, arrays and builtin containers")


def _reason(error: Exception) -> str:
    """The first line of the message, without torch's advice to load the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return text.splitlines()[0] if text else "no further reason"


def _names_in(path: Path) -> Iterator[str]:
    """The dotted names that a file's pickles ask for, in order, as far as the file can be read."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield from _names_in_pickles(file)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.rpartition("/")[2] == "data.pkl":
                    with archive.open(entry) as file:
                        yield from _names_in_pickles(file)
    except (
        zipfile.BadZipFile,
        OSError,
        NotImplementedError,
        RuntimeError,
    ):  # damaged or encrypted: no more names
        return


def _names_in_pickles(file: IO[bytes]) -> Iterator[str]:
    """The names in consecutive pickles (the legacy format has several), up to the first non-opcode."""
    strings: deque[str] = deque(maxlen=2)
    memo: dict[int, str] = {}
    while True:
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings)
                elif "UNICODE" in opcode.name:
                    strings.append(str(argument)[:200])
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
                    memo[int(str(argument))] = strings[-1] if strings else ""
                elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
                    strings.append(memo.get(int(str(argument)), ""))
        except (ValueError, IndexError, OverflowError):
            return

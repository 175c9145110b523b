"""``pickle.load`` for files from anywhere: arrays, tensors, strings, numbers and builtin containers, nothing else.

A pickle names functions and calls them. Here a name is looked up in the list below and nowhere else, and what
it finds there are the small classes of `plain_values` and functions that check their arguments; no module is
imported. Files of Python 2 are read too: their strings as latin1, as their authors' code reads them.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmer_fast.data.errors import DataError
from mmer_fast.data.pickle_scan import check_memo, names_in_pickles, refused_names
from mmer_fast.data.plain_values import ALLOWED_NAMES, PickledArray, PickledDtype, PickledNamespace, to_plain
from mmer_fast.data.safe_load import load_plain


class _Call:
    """A function that a pickle may call and can do nothing else to."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise DataError("a pickle that changes a function is refused")


def _latin1(text: str = "", encoding: str = "latin1") -> bytes:
    """``_codecs.encode`` and ``bytearray``: how protocol 2 writes bytes."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise DataError("bytes: expected a latin1 string")
    return text.encode("latin1")


def _empty_dict(*_: Any) -> dict:
    """``defaultdict``: its items follow, and its factory is of no use to data."""
    return {}


def _storage(data: bytes) -> Any:
    """The storage of a tensor that was pickled without ``torch.save``."""
    if not isinstance(data, bytes):
        raise DataError("tensor storage: expected bytes")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, {})


_CLASSES = (PickledDtype, PickledArray, PickledNamespace)
_FOUND: dict[str, Any] = {name: found if found in _CLASSES else _Call(found) for found, name in ALLOWED_NAMES}
_FOUND |= {
    "collections.OrderedDict": _Call(dict),
    "collections.defaultdict": _Call(_empty_dict),
    "_codecs.encode": _Call(_latin1),
    "torch._utils._rebuild_tensor_v2": _Call(_tensor),
    "torch.storage._load_from_bytes": _Call(_storage),
}
for _module in ("builtins", "__builtin__"):
    _FOUND |= {f"{_module}.{_type.__name__}": _Call(_type) for _type in (set, frozenset, list, dict, int, float)}
    _FOUND[f"{_module}.bytearray"] = _Call(_latin1)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _FOUND[f"{module}.{name}"]
        except KeyError:
            raise DataError(f"asks for {module}.{name}") from None

    def persistent_load(self, key: Any) -> Any:
        raise DataError("references to objects outside the file are refused")


def load_pickle(path: Path) -> Any:
    """The object in a pickle of any protocol, or in a file of ``torch.save`` with a pickle's suffix.

    Returns:
        Dicts, lists, tuples, sets, NumPy arrays, strings, bytes, numbers, booleans and None; arrays of objects
        as lists. Arrays may be read-only.

    Raises:
        DataError: the file names a class or function that is not plain data (the message names it; nothing of
            it was imported or called), or is damaged.
    """
    if zipfile.is_zipfile(path):
        return load_plain(path)
    with path.open("rb") as file:
        try:
            check_memo(file)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd escapes in damaged strings
                return to_plain(_PlainUnpickler(file, encoding="latin1").load())
        except Exception as error:  # a damaged pickle can raise anything, and all of it means: the file is unusable
            file.seek(0)
            refused = refused_names(names_in_pickles(file))
            if refused:
                message = f"refused, since it asks for {', '.join(refused)}; expected only arrays and builtin values"
            elif isinstance(error, DataError):
                message = str(error)
            else:
                message = f"not a readable pickle ({type(error).__name__}: {str(error)[:200] or 'no further reason'})"
            raise DataError(f"{path}: {message}") from error

"""``torch.load`` for files from anywhere: tensors, plain arrays and builtin containers, nothing else.

A ``.pt`` file is a pickle, and a pickle names functions to call. ``weights_only=True`` refuses every name
outside its own list. The few names with which NumPy pickles an array are added to that list, but lead to the
small classes of `plain_values`.

A file that cannot be loaded is scanned, not executed, for the names it asks for; the error states them.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmer_fast.data.errors import DataError
from mmer_fast.data.pickle_scan import names_in_pickles, refused_names
from mmer_fast.data.plain_values import ALLOWED_NAMES, to_plain


def load_plain(path: Path) -> Any:
    """The object in a file written by ``torch.save``, zip or legacy format, tensors as NumPy arrays.

    Returns:
        Dicts, lists, tuples, NumPy arrays, strings, numbers, booleans and None. Arrays may be read-only.

    Raises:
        DataError: the file names a class or function that is not plain data (the message names it; nothing of
            it was imported or called), is truncated, or was not written by ``torch.save``.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED_NAMES), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return to_plain(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged pickle can raise anything, and all of it means: this file is unusable
        refused = refused_names(_names_in(path))
        if refused:
            message = f"refused, since it asks for {', '.join(refused)}; expected only tensors and plain arrays"
        elif isinstance(error, DataError):
            message = str(error)
        else:
            message = f"not a readable torch.save file ({type(error).__name__}: {_reason(error)})"
        raise DataError(f"{path}: {message}") from error


def _reason(error: Exception) -> str:
    """The first line of the message, without torch's advice to load the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return text.splitlines()[0] if text else "no further reason"


def _names_in(path: Path) -> Iterator[str]:
    """The dotted names that a file's pickles ask for, in order, as far as the file can be read."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                yield from names_in_pickles(file)
            return
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.rpartition("/")[2] == "data.pkl":
                    with archive.open(entry) as file:
                        yield from names_in_pickles(file)
    except Exception:  # damaged or encrypted: no more names
        return

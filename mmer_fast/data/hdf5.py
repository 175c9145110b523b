"""HDF5 files from others: what may be read from them, through h5py, which is imported when one is opened.

Only data inside the file is read. A file may also point to other files (external links, external storage,
virtual data sets): those are refused. HDF5 holds no code, but its library parses the file in C; open files of
unknown origin where you would open any other binary of unknown origin.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast.data.errors import DataError


def require_h5py(path: Path) -> None:
    """DataError that says how to install h5py, where it is missing."""
    if importlib.util.find_spec("h5py") is None:
        raise DataError(f"{path}: needs the package h5py: pip install 'mmer_fast[train]' (or pip install h5py)")


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """The open file; whatever the library raises inside the block becomes a DataError."""
    require_h5py(path)
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{path}: not a readable HDF5 file ({type(error).__name__}: {str(error)[:200]})") from error


def write_hdf5(path: Path, fill: Callable[[Any], None]) -> None:
    """Write a file that ``fill`` puts together in memory: the library does not survive a full disk."""
    import h5py

    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        fill(file)
    path.write_bytes(content.getbuffer())


def member(group: Any, name: str, where: str) -> Any:
    """A group or data set that lies in the file itself.

    Raises:
        DataError: it is missing, or a link to elsewhere.
    """
    import h5py

    link = group.get(name, getlink=True)
    if link is None:
        raise DataError(f"{where}: missing {name!r}; got {', '.join(list(group)[:8]) or 'nothing'}")
    if not isinstance(link, h5py.HardLink):
        raise DataError(f"{where}: {name!r}: a link to another place is refused")
    return group[name]


def subgroup(group: Any, name: str, where: str) -> Any:
    """A group inside the file; DataError where it is something else."""
    import h5py

    found = member(group, name, where)
    if not isinstance(found, h5py.Group):
        raise DataError(f"{where}: {name!r}: expected a group; got {_kind(found)}")
    return found


def numbers(group: Any, name: str, where: str, kinds: str = "f", ndim: int = 2) -> Any:
    """A data set of numbers, not yet read: ``[...]`` reads a part of it.

    Raises:
        DataError: another kind or rank, or its values lie in other files.
    """
    import h5py

    found = member(group, name, where)
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in kinds or found.ndim != ndim:
        raise DataError(f"{where}: {name!r}: expected numbers of {ndim} axes; got {_kind(found)}")
    if found.external or found.is_virtual:
        raise DataError(f"{where}: {name!r}: values in other files are refused")
    return found


def rows(dataset: Any) -> np.ndarray:
    """All of a two-dimensional data set as float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(dataset[()]).astype(np.float32, copy=False)


def _kind(found: Any) -> str:
    shape = getattr(found, "shape", None)
    return f"{found.dtype} of shape {shape}" if shape is not None else type(found).__name__

"""One .csd file of the CMU-MultimodalSDK: HDF5 with ``/<root>/data/<id>/features`` and ``/intervals``.

`mmer_fast.data.csd` makes a data set of a folder of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast.data.errors import DataError
from mmer_fast.data.hdf5 import member, numbers, subgroup, write_hdf5


def root_name(h5: Any, file: Path) -> str:
    """The name of the one root group.

    Raises:
        DataError: there is none, or more than one.
    """
    names = list(h5)
    if len(names) != 1:
        raise DataError(f"{file}: expected one root group; got {', '.join(names[:8]) or 'none'}")
    return names[0]


def entries_of(h5: Any, file: Path) -> Any:
    """The group that has an entry for each id."""
    return subgroup(subgroup(h5, root_name(h5, file), str(file)), "data", str(file))


def holds_numbers(h5: Any, file: Path) -> bool:
    """Whether its features are numbers, not words or phones; the first entry tells.

    Raises:
        DataError: it has no entry.
    """
    data = entries_of(h5, file)
    first = next(iter(data), None)
    if first is None:
        raise DataError(f"{file}: data: expected an entry a video; got none")
    where = f"{file}: {first!r}"
    found = member(subgroup(data, first, where), "features", where)
    return getattr(getattr(found, "dtype", None), "kind", "") == "f"


def entry_of(data: Any, entry: str, file: Path, kinds: str = "f") -> tuple[Any, Any]:
    """The intervals (T, 2) and features (T, D) of an id, not yet read.

    Args:
        data: from `entries_of`.
        entry: the id.
        file: named in errors.
        kinds: of numbers that the features may be, as NumPy's ``dtype.kind``.

    Raises:
        DataError: they are missing, or of other shapes or kinds.
    """
    where = f"{file}: {entry!r}"
    group = subgroup(data, entry, where)
    intervals, features = numbers(group, "intervals", where, "fiu"), numbers(group, "features", where, kinds)
    if intervals.shape != (len(features), 2) or 0 in features.shape:
        raise DataError(
            f"{where}: expected features (T, D) and intervals (T, 2); got {features.shape} and {intervals.shape}"
        )
    return intervals, features


def write_file(path: Path, root: str, entries: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Write the features and intervals of ids, (id, features, intervals) each, below a root group of this name."""

    def fill(h5: Any) -> None:
        data = h5.create_group(f"{root}/data")
        for entry, features, intervals in entries:
            group = data.create_group(entry)
            group.create_dataset("features", data=features)
            group.create_dataset("intervals", data=intervals)
        metadata = h5.create_group(f"{root}/metadata")
        for key, value in {"root name": root, "dataset name": "synthetic", "alignment compatible": True}.items():
            metadata.create_dataset(key, data=np.array([json.dumps(value)], dtype=object))

    write_hdf5(path, fill)

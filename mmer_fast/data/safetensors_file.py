"""safetensors data sets: the arrays of `flat`, with label names and the order of the modalities in the header.

    metadata: {"label_names": JSON list of K strings, "modalities": JSON list, "{split}_extras_{name}": JSON list of N
               strings}, all optional

The format holds numbers only, so extras of strings, one a sample, are in the header, too.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast._files import write_atomically
from mmer_fast.data.containers import MultiModalData
from mmer_fast.data.errors import DataError
from mmer_fast.data.flat import assemble, flatten, splits_in
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.large_arrays import LARGE, blocks, zeros
from mmer_fast.data.needs import FEATURES, SPLITS
from mmer_fast.data.sequences import decoded

EXTRAS = tuple(f"{split}_extras_" for split in SPLITS)


def write_safetensors(data: MultiModalData, path: str | Path) -> None:
    """Write a data set so that a reader sees either the old file or the whole new one; a split without labels is
    written without.

    Raises:
        DataError: ``data`` is inconsistent, or safetensors is not installed.
        OSError: the file cannot be written; nothing is left of it.
    """
    _require_package(Path(path))
    from safetensors.numpy import save_file

    data.check(FEATURES)
    flat = flatten(data)
    arrays = {key: np.ascontiguousarray(x) for key, x in flat.items() if x.dtype.kind in "biuf"}
    texts = {key: x.tolist() for key, x in flat.items() if x.dtype.kind in "SU" and x.ndim == 1}
    metadata = {key: json.dumps([decoded(text) for text in values]) for key, values in texts.items()}
    metadata |= {"label_names": json.dumps(data.label_names)} if data.label_names else {}
    metadata["modalities"] = json.dumps(list(data.modalities))

    def write(partial: Path) -> None:
        try:
            save_file(arrays, partial, metadata)
        except Exception as error:
            if isinstance(error, OSError):
                raise
            raise OSError(str(error)) from error

    write_atomically(Path(path), write)


def _read(source: Source) -> MultiModalData:
    path = source.path
    _require_package(path)
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: _array(file, key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except DataError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{path}: not a readable .safetensors file ({str(error)[:200]})") from error
    label_names = _names(path, metadata, "label_names")
    texts = {key: _names(path, metadata, key) for key in metadata if key.startswith(EXTRAS)}
    arrays |= {key: np.array(values, dtype=np.str_) for key, values in texts.items()}
    return assemble(path, _ordered(path, arrays, _names(path, metadata, "modalities")), label_names, source.needs)


def _array(file: Any, key: str) -> np.ndarray:
    """An array of the file; a large one piece by piece, into one that memory need not hold."""
    stored = file.get_slice(key)
    shape = stored.get_shape()
    dtype = stored[:1].dtype if shape and shape[0] > 0 else np.dtype(np.uint8)
    if math.prod(shape) * dtype.itemsize < LARGE:
        return file.get_tensor(key)
    values = zeros(shape, dtype)
    for block in blocks(values):
        values[block] = stored[block.start : block.stop]
    return values


def _names(path: Path, metadata: dict[str, str], key: str) -> list[str] | None:
    if key not in metadata:
        return None
    try:
        names = json.loads(metadata[key])
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: metadata {key}: expected a JSON list of strings; got {metadata[key][:80]!r}")
    return names


def _ordered(path: Path, arrays: dict[str, np.ndarray], modalities: list[str] | None) -> dict[str, np.ndarray]:
    """The arrays with those of the named modalities first; the file sorts them by name."""
    first = [f"{split}_{name}" for split in splits_in(arrays) for name in modalities or []]
    missing = [key for key in first if key not in arrays]
    if missing:
        raise DataError(f"{path}: metadata modalities: there is no array {missing[0]}")
    return {key: arrays[key] for key in first} | arrays


def _require_package(path: Path) -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise DataError(f"{path}: needs the package safetensors: pip install 'mmer_fast[train]'")


FORMAT = Format(
    name="safetensors",
    title="a .safetensors data set",
    detect=lambda source: source.suffix == ".safetensors",
    read=_read,
    write=lambda data, path: write_safetensors(data, path),
    suffix=".safetensors",
)

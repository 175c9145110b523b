"""The layout of our own formats: one named array a thing, in ``.npz`` or safetensors.

    {split}_{modality}            (N, T, D) float, for each split in train, valid, test
    {split}_{modality}_lengths    (N,) integer, optional; without it lengths come from all-zero rows
    {split}_labels                (N, K) multi-hot: bool, integer or float holding only 0 and 1
    {split}_extras_{name}         (N, ...) anything else known about the samples, optional

and the K label names. Values past a given length are padding whatever they hold, and are set to zero (with a
note).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmer_fast.data.containers import SPLITS, MultiModalData, Split
from mmer_fast.data.errors import DataError
from mmer_fast.data.large_arrays import in_float32
from mmer_fast.data.padding import derive_lengths, derived_note, zero_past_lengths


def flatten(data: MultiModalData) -> dict[str, np.ndarray]:
    """The arrays of a data set by key, label names left out; nothing is copied."""
    arrays: dict[str, np.ndarray] = {}
    for name, split in data.splits.items():
        for modality in data.modalities:
            arrays[f"{name}_{modality}"] = split.features[modality]
            arrays[f"{name}_{modality}_lengths"] = split.lengths[modality]
        arrays[f"{name}_labels"] = split.labels
        arrays.update({f"{name}_extras_{extra}": values for extra, values in split.extras.items()})
    return arrays


def assemble(path: Path, arrays: dict[str, np.ndarray], label_names: list[str] | None) -> MultiModalData:
    """The data set of a file's arrays, not yet checked; modalities in the order of ``arrays``.

    Raises:
        DataError: naming the key, what was expected and what came.
    """
    _refuse_unknown_keys(path, arrays)
    modalities = _modalities(path, arrays)
    notes: list[str] = []
    splits = {split: _read_split(path, arrays, split, modalities, notes) for split in SPLITS}
    sizes = {modality: splits["train"].features[modality].shape[2] for modality in modalities}
    if label_names is None:
        label_names = [f"label_{k}" for k in range(splits["train"].labels.shape[1])]
        notes.append("labels are numbered: the file has no label_names")
    return MultiModalData(splits, label_names, sizes, str(path), list(dict.fromkeys(notes)))


def _refuse_unknown_keys(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for key in arrays:
        if not key.startswith(tuple(f"{split}_" for split in SPLITS)):
            raise DataError(
                f"{path}: unknown key {key}; expected label_names, or {{split}}_{{modality}} and the like for the "
                f"splits {', '.join(SPLITS)}"
            )


def _modalities(path: Path, arrays: dict[str, np.ndarray]) -> list[str]:
    """The modalities in file order, the same in every split."""
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        rest = [key.removeprefix(f"{split}_") for key in arrays if key.startswith(f"{split}_")]
        if not rest:
            raise DataError(f"{path}: no keys for split {split}; expected {split}_labels and {split}_{{modality}}")
        if "labels" not in rest:
            raise DataError(f"{path}: missing key {split}_labels")
        found[split] = [
            name
            for name in rest
            if name != "labels" and not name.startswith("extras_") and not name.endswith("_lengths")
        ]
        for name in rest:
            owner = name.removesuffix("_lengths")
            if name.endswith("_lengths") and not name.startswith("extras_") and owner not in found[split]:
                raise DataError(f"{path}: key {split}_{name} has no array {split}_{owner} to belong to")
    names = found["train"]
    if not names:
        raise DataError(f"{path}: no modality; expected keys train_{{modality}}, e.g. train_text")
    for split in SPLITS[1:]:
        for name in names:
            if name not in found[split]:
                raise DataError(f"{path}: missing key {split}_{name}")
        for name in found[split]:
            if name not in names:
                raise DataError(f"{path}: missing key train_{name} (there is {split}_{name})")
    return names


def _read_split(
    path: Path, arrays: dict[str, np.ndarray], split: str, modalities: list[str], notes: list[str]
) -> Split:
    labels = _labels(path, f"{split}_labels", arrays[f"{split}_labels"])
    features, lengths = {}, {}
    for modality in modalities:
        key = f"{split}_{modality}"
        values = _features(path, key, arrays[key], len(labels))
        given = arrays.get(f"{key}_lengths")
        if given is None:
            values, lengths[modality], moved = derive_lengths(values)
            notes.append(derived_note(modality, moved))
        else:
            lengths[modality] = _lengths(path, f"{key}_lengths", given, values.shape)
            values, dirty = zero_past_lengths(values, lengths[modality])
            if dirty:
                notes.append(f"{modality}: values past the given lengths set to zero")
        features[modality] = values
    prefix = f"{split}_extras_"
    extras = {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}
    return Split(features, lengths, labels, extras)


def _labels(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    if values.ndim != 2 or values.dtype.kind not in "buif":
        raise DataError(
            f"{path}: key {key}: expected (N, K) of 0 and 1, a column for each label; got {values.dtype} of shape "
            f"{values.shape}"
        )
    with np.errstate(invalid="ignore"):
        wrong = values[(values != 0) & (values != 1)]
    if wrong.size:
        raise DataError(f"{path}: key {key}: expected only 0 and 1, a column for each label; got {wrong[0]}")
    return values.astype(np.uint8)


def _features(path: Path, key: str, values: np.ndarray, n: int) -> np.ndarray:
    if values.ndim != 3 or values.dtype.kind != "f" or 0 in values.shape[1:]:
        raise DataError(f"{path}: key {key}: expected (N, T, D) floats; got {values.dtype} of shape {values.shape}")
    if len(values) != n:
        raise DataError(f"{path}: key {key}: expected {n} samples, as many as labels; got {len(values)}")
    return in_float32(values)  # what overflows becomes inf, which the check of finite values names


def _lengths(path: Path, key: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    n, steps, _ = shape
    if values.dtype.kind not in "iu" or values.shape != (n,):
        raise DataError(f"{path}: key {key}: expected ({n},) integers; got {values.dtype} of shape {values.shape}")
    outside = values[(values < 0) | (values > steps)]
    if outside.size:
        raise DataError(f"{path}: key {key}: expected values in [0, {steps}]; got {outside[0]}")
    return values.astype(np.int64)

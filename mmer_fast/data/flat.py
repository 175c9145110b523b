"""The layout of our own formats: one named array a thing, in ``.npz`` or safetensors.

    {split}_{modality}            (N, T, D) float, for each split in train, valid, test
    {split}_{modality}_lengths    (N,) integer, optional; without it lengths come from all-zero rows
    {split}_labels                (N, K) multi-hot: bool, integer or float holding only 0 and 1
    {split}_extras_{name}         (N, ...) anything else known about the samples, optional

and the K label names. For prediction a split, its labels and the label names may be missing. Values past a given length
are padding whatever they hold, and are set to zero (with a note).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.errors import DataError, MissingPart
from mmer_fast.data.large_arrays import in_float32
from mmer_fast.data.needs import SPLITS, Needs
from mmer_fast.data.padding import derive_lengths, derived_note, zero_past_lengths
from mmer_fast.data.sequences import SampleCount


def flatten(data: MultiModalData) -> dict[str, np.ndarray]:
    """The arrays of a data set by key, label names left out; nothing is copied."""
    arrays: dict[str, np.ndarray] = {}
    for name, split in data.splits.items():
        for modality in data.modalities:
            arrays[f"{name}_{modality}"] = split.features[modality]
            arrays[f"{name}_{modality}_lengths"] = split.lengths[modality]
        if split.labelled:
            arrays[f"{name}_labels"] = split.labels
        arrays.update({f"{name}_extras_{extra}": values for extra, values in split.extras.items()})
    return arrays


def splits_in(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The splits that some key belongs to."""
    return tuple(split for split in SPLITS if any(key.startswith(f"{split}_") for key in arrays))


def assemble(path: Path, arrays: dict[str, np.ndarray], label_names: list[str] | None, needs: Needs) -> MultiModalData:
    """The data set of a file's arrays, not yet checked; modalities in the order of ``arrays``.

    Raises:
        MissingPart: a split or its labels are needed, and there is no key.
        DataError: naming the key, what was expected and what came.
    """
    _refuse_unknown_keys(path, arrays)
    modalities = _modalities(path, arrays, needs)
    notes: list[str] = []
    wanted = needs.wanted(splits_in(arrays))
    splits = {split: _read_split(path, arrays, split, modalities, notes) for split in wanted}
    sizes = {modality: splits[wanted[0]].features[modality].shape[2] for modality in modalities}
    if label_names is None:
        labelled = [split.labels for split in splits.values() if split.labelled]
        label_names = [f"label_{k}" for k in range(labelled[0].shape[1])] if labelled else []
        notes += ["labels are numbered: the file has no label_names"] if labelled else []
    return MultiModalData(splits, label_names, sizes, str(path), list(dict.fromkeys(notes)))


def _refuse_unknown_keys(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for key in arrays:
        if not key.startswith(tuple(f"{split}_" for split in SPLITS)):
            raise DataError(
                f"{path}: unknown key {key}; expected label_names, or {{split}}_{{modality}} and the like for the "
                f"splits {', '.join(SPLITS)}"
            )


def _modalities(path: Path, arrays: dict[str, np.ndarray], needs: Needs) -> list[str]:
    """The modalities in file order, the same in every split."""
    found: dict[str, list[str]] = {}
    first, *others = needs.wanted(splits_in(arrays))
    for split in (first, *others):
        rest = [key.removeprefix(f"{split}_") for key in arrays if key.startswith(f"{split}_")]
        if not rest:
            expected = f"{split}_{{modality}}"
            if needs.labels:
                raise MissingPart(f"{path}: no keys for split {split}; expected {split}_labels and {expected}")
            got = ", ".join(splits_in(arrays)) or "none"
            raise MissingPart(f"{path}: no keys for split {split}; expected {expected}; got the splits {got}")
        if needs.labels and "labels" not in rest:
            raise MissingPart(f"{path}: missing key {split}_labels")
        found[split] = [
            name
            for name in rest
            if name != "labels" and not name.startswith("extras_") and not name.endswith("_lengths")
        ]
        for name in rest:
            owner = name.removesuffix("_lengths")
            if name.endswith("_lengths") and not name.startswith("extras_") and owner not in found[split]:
                raise DataError(f"{path}: key {split}_{name} has no array {split}_{owner} to belong to")
    names = found[first]
    if not names:
        raise DataError(f"{path}: no modality; expected keys {first}_{{modality}}, e.g. {first}_text")
    for split in others:
        for name in names:
            if name not in found[split]:
                raise DataError(f"{path}: missing key {split}_{name}")
        for name in found[split]:
            if name not in names:
                raise DataError(f"{path}: missing key {first}_{name} (there is {split}_{name})")
    return names


def _read_split(
    path: Path, arrays: dict[str, np.ndarray], split: str, modalities: list[str], notes: list[str]
) -> Split:
    given_labels = arrays.get(f"{split}_labels")
    samples = SampleCount(None if given_labels is None else _labels(path, f"{split}_labels", given_labels))
    features, lengths = {}, {}
    for modality in modalities:
        key = f"{split}_{modality}"
        values = _features(path, key, arrays[key], samples)
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
    return Split(features, lengths, samples.labels, extras)


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


def _features(path: Path, key: str, values: np.ndarray, samples: SampleCount) -> np.ndarray:
    if values.ndim != 3 or values.dtype.kind != "f" or 0 in values.shape[1:]:
        raise DataError(
            f"{path}: key {key}: expected (N, T, D) floats; got {values.dtype} of shape {values.shape} (a vector for "
            f"each sample has T = 1; what is no feature is called {{split}}_extras_{{name}})"
        )
    samples.hold(f"{path}: key {key}", values)
    return in_float32(values)  # what overflows becomes inf, which the check of finite values names


def _lengths(path: Path, key: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    n, steps, _ = shape
    if values.dtype.kind not in "iu" or values.shape != (n,):
        raise DataError(f"{path}: key {key}: expected ({n},) integers; got {values.dtype} of shape {values.shape}")
    outside = values[(values < 0) | (values > steps)]
    if outside.size:
        raise DataError(f"{path}: key {key}: expected values in [0, {steps}]; got {outside[0]}")
    return values.astype(np.int64)

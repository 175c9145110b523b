"""From what a file holds to padded float32 features: the steps that every reader of others' formats shares."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import numpy as np

from mmer_fast.data.containers import no_labels
from mmer_fast.data.errors import DataError
from mmer_fast.data.large_arrays import blocks, copied, in_float32, zeros
from mmer_fast.data.padding import derive_lengths, derived_note, undo_front_padding, zero_past_lengths


def describe(value: Any) -> str:
    """A value's kind for an error message: dtype and shape of an array, else the type and length."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    if isinstance(value, (list, tuple, dict, set)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


class SampleCount:
    """How many samples a split has: as many as its labels, or as the first modality that is held to it.

    Args:
        labels: (N, K), None where they are not known.
        name: what an error calls the labels.
    """

    def __init__(self, labels: np.ndarray | None, name: str = "labels") -> None:
        self.given = labels
        self.count = None if labels is None else len(labels)
        self.source = name

    def hold(self, where: str, value: Sized) -> int:
        """How many samples there are.

        Raises:
            DataError: ``value`` has another number of rows; or is the first to say it, and has none.
        """
        if self.count is None:
            if len(value) == 0:
                raise DataError(f"{where}: expected at least one sample; got none")
            self.count, self.source = len(value), where.rpartition(": ")[2]
        if len(value) != self.count:
            raise DataError(f"{where}: expected {self.count} samples, as many as {self.source}; got {len(value)}")
        return self.count

    @property
    def labels(self) -> np.ndarray:
        """Those that were given, else none for as many samples as there are (`no_labels`)."""
        return no_labels(self.count or 0) if self.given is None else self.given


def as_features(where: str, value: Any, samples: SampleCount) -> np.ndarray:
    """``value`` as (N, T, D) float32, itself where it is that already.

    Raises:
        DataError: not an array of floats of three axes, or an axis other than N is empty, or N differs.
    """
    if not isinstance(value, np.ndarray) or value.ndim != 3 or value.dtype.kind != "f":
        raise DataError(f"{where}: expected (N, T, D) floats; got {describe(value)}")
    samples.hold(where, value)
    if 0 in value.shape[1:]:
        raise DataError(f"{where}: expected (N, T >= 1, D >= 1); got shape {value.shape}")
    return in_float32(value)  # what overflows becomes inf, which the check of finite values names


def as_lengths(where: str, value: Any, n: int, steps: int) -> np.ndarray:
    """``value`` as (N,) int64 in [0, T]; a list, or floats that are whole numbers, will do.

    Raises:
        DataError: another shape or kind, or a value outside.
    """
    array = np.asarray(value) if isinstance(value, (list, tuple)) and _all_numbers(value) else value
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf" or array.size != n or array.shape[:1] != (n,):
        raise DataError(f"{where}: expected ({n},) integers; got {describe(value)}")
    array = array.reshape(n)
    wrong = array[~((array >= 0) & (array <= steps) & (array == np.trunc(array)))]
    if wrong.size:
        raise DataError(f"{where}: expected whole numbers in [0, {steps}]; got {wrong[0]}")
    return array.astype(np.int64)


def silence_minus_infinity(name: str, features_ntd: np.ndarray, notes: list[str]) -> np.ndarray:
    """-inf in audio (the logarithm of silence) becomes 0, with a note; a read-only array is copied for that."""
    if name != "audio":
        return features_ntd
    for block in blocks(features_ntd):
        silent = np.isneginf(features_ntd[block])
        if silent.any():
            if not features_ntd.flags.writeable:
                features_ntd = copied(features_ntd)
            features_ntd[block][silent] = 0
            notes.append("audio: -inf replaced by 0")
    return features_ntd


def settle(
    name: str, features_ntd: np.ndarray, lengths_n: np.ndarray | None, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Features that start at index 0 and are zero past their lengths.

    Args:
        name: of the modality, for the notes; -inf is replaced in "audio".
        features_ntd: (N, T, D) float32.
        lengths_n: (N,) int64 where the file states them; None: from all-zero rows.
        notes: gets a sentence for whatever was changed or assumed.

    Returns:
        features, lengths.
    """
    features_ntd = silence_minus_infinity(name, features_ntd, notes)
    if lengths_n is None:
        features_ntd, lengths_n, moved = derive_lengths(features_ntd)
        notes.append(derived_note(name, moved))
        return features_ntd, lengths_n
    features_ntd, moved = undo_front_padding(features_ntd, lengths_n)
    if moved:
        notes.append(f"{name}: padding in front removed, so sequences start at 0")
    features_ntd, dirty = zero_past_lengths(features_ntd, lengths_n)
    if dirty:
        notes.append(f"{name}: values past the given lengths set to zero")
    return features_ntd, lengths_n


def pad(
    name: str, shapes: list[tuple[int, int]], rows: Iterable[np.ndarray], notes: list[str], *, derive: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """One padded array of samples that are read one after the other.

    Args:
        name: of the modality.
        shapes: (T, D) of every sample, one D.
        rows: the samples themselves, in the same order; only one is held at a time.
        derive: where all T are equal, they say nothing: lengths come from all-zero rows.

    Returns:
        (N, max T, D) float32 features, zero past the lengths, and (N,) int64 lengths.
    """
    steps_n = np.array([steps for steps, _ in shapes], dtype=np.int64)
    features_ntd = zeros((len(shapes), max(1, int(steps_n.max(initial=0))), shapes[0][1]))
    with np.errstate(over="ignore", invalid="ignore"):
        for i, row in enumerate(rows):
            features_ntd[i, : steps_n[i]] = row
    if derive and len(set(steps_n.tolist())) == 1:
        return settle(name, features_ntd, None, notes)
    return silence_minus_infinity(name, features_ntd, notes), steps_n


def decoded(value: Any) -> str:
    """A name that may be bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _all_numbers(values: Iterable) -> bool:
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values)

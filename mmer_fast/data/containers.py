"""The in-memory form of a multi-modal, multi-label data set.

Every reader ends here, and everything after it (batching, training, evaluation) starts here. A split holds
one padded array a modality; modalities are a mapping name -> feature size, never a fixed set of three.

Shapes: N samples, T time steps (may differ between modalities), D features, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmer_fast.data.errors import DataError, MissingPart
from mmer_fast.data.large_arrays import blocks
from mmer_fast.data.needs import EVERYTHING, SPLITS, Needs


def no_labels(samples: int) -> np.ndarray:
    """(N, 0) uint8: the labels of a split whose labels are not known."""
    return np.zeros((samples, 0), dtype=np.uint8)


@dataclass
class Split:
    """One of train, valid and test.

    Attributes:
        features: modality -> (N, T, D) float32, zero from each sample's length on.
        lengths: modality -> (N,) int64, in [0, T]; 0 says that the sample lacks the modality.
        labels: (N, K) uint8, multi-hot; (N, 0), no column at all, where they are not known (`no_labels`).
        extras: name -> (N, ...) array of anything else known about the samples, e.g. the planted positions of
            the synthetic data set.
    """

    features: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    labels: np.ndarray
    extras: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether the labels are known."""
        return 0 not in self.labels.shape[1:]

    def select(self, modalities: Sequence[str]) -> Split:
        """The same samples with only ``modalities``, in that order. Arrays are shared, not copied."""
        return Split(
            features={name: self.features[name] for name in modalities},
            lengths={name: self.lengths[name] for name in modalities},
            labels=self.labels,
            extras=self.extras,
        )


@dataclass
class MultiModalData:
    """A data set: splits over the same modalities and labels.

    Attributes:
        splits: "train", "valid" and "test" -> Split. One that is for prediction only may have fewer (`needs.Needs`).
        label_names: K names, in the order of the label columns; may be empty where no split has labels.
        modalities: modality -> feature size D; its order is the order of the model's encoders.
        source: where the data came from, for logs and checkpoints.
        notes: what a reader changed or assumed, one sentence each, meant to be shown to the user.
    """

    splits: dict[str, Split]
    label_names: list[str]
    modalities: dict[str, int]
    source: str
    notes: list[str] = field(default_factory=list)

    def select(self, modalities: Sequence[str]) -> MultiModalData:
        """The same data with only ``modalities``, in that order.

        Raises:
            DataError: a name is unknown or given twice, no name is given, or one text in the place of a list of names.
        """
        if isinstance(modalities, str):
            raise DataError(f"modalities: expected a list of names; got the text {modalities!r}")
        names = list(modalities)
        available = ", ".join(self.modalities)
        if not names:
            raise DataError(f"modalities: expected at least one of {available}; got none")
        if len(set(names)) != len(names):
            raise DataError(f"modalities: expected each name once; got {', '.join(names)}")
        unknown = [name for name in names if name not in self.modalities]
        if unknown:
            raise DataError(f"modalities: {', '.join(map(repr, unknown))} not in {self.source}; available: {available}")
        return MultiModalData(
            splits={name: split.select(names) for name, split in self.splits.items()},
            label_names=self.label_names,
            modalities={name: self.modalities[name] for name in names},
            source=self.source,
            notes=self.notes,
        )

    def check(self, needs: Needs = EVERYTHING) -> MultiModalData:
        """Validate everything the rest of the package relies on; returns ``self`` for chaining.

        Args:
            needs: what has to be there; by default all splits with labels.

        Raises:
            MissingPart: a split, or the labels of one, is needed and missing.
            DataError: a split is empty or of another name, modalities, feature sizes or labels differ between splits,
                sample counts differ within a split, a length lies outside [0, T], a dtype or rank is wrong, a
                value is not finite, padding is not zero, or a label is neither 0 nor 1.
        """
        self.check_parts(needs)
        if not self.modalities:
            raise DataError("modalities: expected at least one; got none")
        named = self.label_names or not any(split.labelled for split in self.splits.values())
        if not named or len(set(self.label_names)) != len(self.label_names):
            raise DataError(f"label_names: expected one or more distinct names; got {self.label_names}")
        for name, split in self.splits.items():
            _check_labels(name, split, len(self.label_names))
            for kind, mapping in (("features", split.features), ("lengths", split.lengths)):
                if list(mapping) != list(self.modalities):
                    raise DataError(
                        f"{name} {kind}: expected modalities {', '.join(self.modalities)}; "
                        f"got {', '.join(mapping) or 'none'}"
                    )
            for modality, size in self.modalities.items():
                _check_modality(name, split, modality, size)
            for extra, values in split.extras.items():
                if values.ndim == 0 or len(values) != len(split) or values.dtype.hasobject:
                    raise DataError(
                        f"{name} extras {extra}: expected {len(split)} rows of plain values; "
                        f"got {values.dtype} of shape {values.shape}"
                    )
        return self

    def check_parts(self, needs: Needs = EVERYTHING) -> None:
        """Hold the data set to the splits and labels that a purpose needs; looks at no value.

        Raises:
            MissingPart: a split, or the labels of one, is needed and missing.
            DataError: there is none, or one of another name.
        """
        got = ", ".join(self.splits) or "none"
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise DataError(f"splits: expected {', '.join(needs.splits or SPLITS)}; got {got}")
        if not set(needs.splits) <= set(self.splits):
            raise MissingPart(f"splits: expected {', '.join(needs.splits)}; got {got}")
        for name, split in self.splits.items():
            if needs.labels and not split.labelled:
                raise MissingPart(f"{name} labels: expected (N, K) of 0 and 1; got none, they are not known")


def _check_labels(name: str, split: Split, n_labels: int) -> None:
    labels = split.labels
    width = n_labels if split.labelled else 0
    if labels.dtype != np.uint8 or labels.ndim != 2 or labels.shape[1] != width:
        raise DataError(
            f"{name} labels: expected uint8 of shape (N, {n_labels}), a column for each of the {n_labels} label names; "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if len(labels) == 0:
        raise DataError(f"{name} labels: expected at least one sample; got none")
    if labels.max(initial=0) > 1:
        raise DataError(f"{name} labels: expected only 0 and 1; got {labels.max()}")


def _check_modality(name: str, split: Split, modality: str, size: int) -> None:
    values, lengths = split.features[modality], split.lengths[modality]
    key = f"{name} {modality}"
    if values.dtype != np.float32 or values.ndim != 3:
        raise DataError(f"{key}: expected float32 of shape (N, T, D); got {values.dtype} of shape {values.shape}")
    n, steps, d = values.shape
    if n != len(split):
        raise DataError(f"{key}: expected {len(split)} samples, as many as labels; got {n}")
    if d != size or d == 0 or steps == 0:
        raise DataError(f"{key}: expected (N, T >= 1, {size}); got shape {values.shape}")
    if lengths.dtype != np.int64 or lengths.shape != (n,):
        raise DataError(f"{key} lengths: expected int64 of shape ({n},); got {lengths.dtype} of shape {lengths.shape}")
    outside = np.flatnonzero((lengths < 0) | (lengths > steps))
    if outside.size:
        i = outside[0]
        raise DataError(f"{key} lengths: expected values in [0, {steps}]; got {lengths[i]} for sample {i}")
    bad, first = 0, ""
    for block in blocks(values):
        finite = np.isfinite(values[block])
        if not finite.all():
            i, t, _ = np.argwhere(~finite)[0]
            first = first or f"sample {block.start + i}, step {t}"
            bad += int(np.sum(~finite))
    if bad:
        raise DataError(
            f"{key}: expected finite values; got {bad} others, first in {first} "
            "(mmer-fast convert IN OUT --replace-nonfinite sets them to 0)"
        )
    for block in blocks(values):
        padding = np.arange(steps) >= lengths[block, None]
        if values[block][padding].any():
            raise DataError(f"{key}: expected zeros past each sample's length; got other values")

"""Padding: lengths from all-zero rows, and zeros past given lengths.

Published feature files seldom state sequence lengths. Padding there is an all-zero feature vector, after the
sequence or, in word-aligned data, in front of it. A zero vector between two others is kept: it is a silent or
faceless moment.

Everything here walks over the samples in blocks, so an array that is mapped from a file larger than memory
costs a block of memory at a time; it is copied only where a value in it has to change.
"""

from __future__ import annotations

import numpy as np

from mmer_fast.data.large_arrays import blocks, copied


@np.errstate(invalid="ignore")  # NaN counts as a value
def derive_lengths(features_ntd: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Strip the all-zero rows at both ends of every sequence.

    Args:
        features_ntd: (N, T, D) float array.

    Returns:
        features: (N, T, D), each sequence moved to start at index 0 (the input itself when none had to move).
        lengths: (N,) int64, 0 where every row is zero.
        moved: whether any sequence had padding in front.
    """
    n, steps, _ = features_ntd.shape
    first_n, end_n = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for block in blocks(features_ntd):
        used_bt = np.any(features_ntd[block] != 0, axis=2)
        present_b = np.any(used_bt, axis=1)
        first_n[block] = np.where(present_b, used_bt.argmax(axis=1), 0)
        end_n[block] = np.where(present_b, steps - used_bt[:, ::-1].argmax(axis=1), 0)
    return _moved_to_front(features_ntd, first_n, end_n), end_n - first_n, bool(first_n.any())


@np.errstate(invalid="ignore")
def undo_front_padding(features_ntd: np.ndarray, lengths_n: np.ndarray) -> tuple[np.ndarray, bool]:
    """Move the sequences to index 0 that lie at the end although their lengths are given.

    A sample of length L is moved when its first T - L rows are all zero and the rest is not (L < T): read from
    index 0 it would lose what it holds past L.

    Returns:
        The features (the input itself when none had to move), and whether any was moved.
    """
    n, steps, _ = features_ntd.shape
    first_n, end_n = np.zeros(n, np.int64), np.asarray(lengths_n, np.int64).copy()
    for i in np.flatnonzero((lengths_n > 0) & (lengths_n < steps)):
        front = steps - int(lengths_n[i])
        if not features_ntd[i, :front].any() and features_ntd[i, int(lengths_n[i]) :].any():
            first_n[i], end_n[i] = front, steps
    return _moved_to_front(features_ntd, first_n, end_n), bool(first_n.any())


@np.errstate(invalid="ignore")
def zero_past_lengths(features_ntd: np.ndarray, lengths_n: np.ndarray) -> tuple[np.ndarray, bool]:
    """Zero every row from each sample's length on.

    Returns:
        The features, changed in place where they can be written to and copied otherwise, and whether any row
        past a length held another value.
    """
    dirty = False
    for block in blocks(features_ntd):
        padding_bt = np.arange(features_ntd.shape[1]) >= lengths_n[block, None]
        if features_ntd[block][padding_bt].any():
            if not features_ntd.flags.writeable:
                features_ntd = copied(features_ntd)
            features_ntd[block][padding_bt] = 0
            dirty = True
    return features_ntd, dirty


def derived_note(modality: str, moved: bool) -> str:
    """The sentence that tells the user where a modality's lengths came from."""
    shift = "; padding in front removed, so sequences start at 0" if moved else ""
    return f"{modality}: lengths derived from all-zero rows{shift}"


def _moved_to_front(features_ntd: np.ndarray, first_n: np.ndarray, end_n: np.ndarray) -> np.ndarray:
    """Rows [first, end) of every sample at index 0; a copy where any first is not 0."""
    if not first_n.any():
        return features_ntd
    result = copied(features_ntd)
    for i in np.flatnonzero(first_n):
        length = end_n[i] - first_n[i]
        result[i, :length] = features_ntd[i, first_n[i] : end_n[i]]
        result[i, length:] = 0
    return result

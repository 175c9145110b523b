"""Padding: lengths from all-zero rows, and zeros past given lengths.

Published feature files seldom state sequence lengths. Padding there is an all-zero feature vector, behind the
sequence or, in word-aligned data, in front of it. A zero vector between two others is kept: it is a silent or
faceless moment.
"""

from __future__ import annotations

import numpy as np


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
    used_nt = np.any(features_ntd != 0, axis=2)
    present_n = np.any(used_nt, axis=1)
    first_n = np.where(present_n, used_nt.argmax(axis=1), 0)
    end_n = np.where(present_n, steps - used_nt[:, ::-1].argmax(axis=1), 0)
    lengths_n = (end_n - first_n).astype(np.int64)
    moved = bool(first_n.any())
    if moved:
        source_nt = np.minimum(first_n[:, None] + np.arange(steps), steps - 1)
        features_ntd = features_ntd[np.arange(n)[:, None], source_nt]
        zero_past_lengths(features_ntd, lengths_n)
    return features_ntd, lengths_n, moved


def zero_past_lengths(features_ntd: np.ndarray, lengths_n: np.ndarray) -> bool:
    """Zero every row from each sample's length on, in place; says whether any held another value."""
    padding_nt = np.arange(features_ntd.shape[1]) >= lengths_n[:, None]
    dirty = bool(features_ntd[padding_nt].any())
    if dirty:
        features_ntd[padding_nt] = 0
    return dirty


def derived_note(modality: str, moved: bool) -> str:
    """The sentence that tells the user where a modality's lengths came from."""
    shift = "; padding in front removed, so sequences start at 0" if moved else ""
    return f"{modality}: lengths derived from all-zero rows{shift}"

"""Emotions as points of valence (unpleasant to pleasant) and arousal (calm to excited), each in [0, 1].

The values of words are those of the NRC-VAD lexicon (Mohammad 2018) for the names that emotions have in this package.
The code published with UniVA has the same numbers.

Shapes: N samples, K emotions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmer_fast.data.generation import ordered_product

NRC_VAD = {
    "happy": (1.0, 0.735),
    "sad": (0.225, 0.333),
    "anger": (0.167, 0.865),
    "surprise": (0.875, 0.875),
    "disgust": (0.052, 0.775),
    "fear": (0.073, 0.840),
    "neutral": (0.5, 0.5),
}
"""Emotion → valence, arousal."""

SCORE_NOISE = 0.05  # standard deviation of each of the two scores that a modality of the synthetic data gets


def expressed_va(present_nk: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """(N, 2) float64: the mean valence and arousal of the emotions that are present; neutral where there is none.

    Args:
        present_nk: (N, K) bool.
        names: K keys of `NRC_VAD`.
    """
    values_k2 = np.array([NRC_VAD[name] for name in names])
    counts_n1 = present_nk.sum(axis=1, keepdims=True)
    return np.where(
        counts_n1 > 0, ordered_product(present_nk, values_k2) / np.maximum(counts_n1, 1), NRC_VAD["neutral"]
    )


def noisy_va(rng: np.random.Generator, present_nk: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """(N, 2) float32 in [0, 1]: `expressed_va` with normal noise of `SCORE_NOISE`, as a model of VA would score it."""
    truth_n2 = expressed_va(present_nk, names)
    return np.clip(truth_n2 + SCORE_NOISE * rng.standard_normal(truth_n2.shape), 0, 1).astype(np.float32)

"""Samples with an ineffectual modality: one that is buried in noise, or missing."""

from __future__ import annotations

import numpy as np

from mmer_fast.data.containers import Split
from mmer_fast.data.ranges import check_factors, check_least, check_parts
from mmer_fast.data.statistics import feature_statistics
from mmer_fast.data.synthetic import SHIFT_MISSING, SHIFT_NONE, SHIFT_UNINFORMATIVE


def make_ineffectual(
    split: Split, *, noisy_share: float = 0.5, missing_share: float = 0.0, scale: float = 10.0, seed: int = 0
) -> Split:
    """The same samples, some of which have one modality, drawn at random, that says nothing any more.

    Args:
        split: at least one modality; nothing of it is changed.
        noisy_share: of the samples, rounded: white Gaussian noise is added to every step of the modality.
        missing_share: of the samples, rounded: the modality has length 0.
        scale: standard deviation of the noise, in units of that of each feature in the split.
        seed: an integer, at least 0; the same arguments give the same bits.

    Returns:
        A split whose extras hold ``shift`` (N,) uint8, 0 as it was, 1 noisy, 2 missing (in the place of one that there
        was), and ``ineffectual`` (N,) int8, the index of the modality, -1 for none.

    Raises:
        DataError: an argument lies outside its range.
    """
    check_parts(noisy_share=noisy_share, missing_share=missing_share)
    check_factors(scale=scale)
    check_least({"seed": (seed, 0)})
    rng = np.random.default_rng(seed)
    count = len(split)
    order = rng.permutation(count)
    n_noisy, n_missing = round(noisy_share * count), round(missing_share * count)
    shift = np.full(count, SHIFT_NONE, dtype=np.uint8)
    shift[order[:n_noisy]] = SHIFT_UNINFORMATIVE
    shift[order[n_noisy : n_noisy + n_missing]] = SHIFT_MISSING
    chosen = rng.integers(len(split.features), size=count).astype(np.int8)
    chosen[shift == SHIFT_NONE] = -1
    features, lengths = {}, {}
    for m, (name, x_ntd) in enumerate(split.features.items()):
        noisy_n, missing_n = ((chosen == m) & (shift == code) for code in (SHIFT_UNINFORMATIVE, SHIFT_MISSING))
        deviation_d = feature_statistics(x_ntd, split.lengths[name])[1]
        used_nt = np.arange(x_ntd.shape[1]) < split.lengths[name][:, None]
        rows_nt = used_nt & noisy_n[:, None]
        spoilt_ntd = np.array(x_ntd)
        noise_ud = rng.standard_normal((int(rows_nt.sum()), x_ntd.shape[2]), dtype=np.float32)
        spoilt_ntd[rows_nt] += noise_ud * (scale * deviation_d).astype(np.float32)
        spoilt_ntd[missing_n] = 0
        features[name], lengths[name] = spoilt_ntd, np.where(missing_n, 0, split.lengths[name])
    extras = {**split.extras, "shift": shift, "ineffectual": chosen}
    return Split(features, lengths, split.labels, extras)

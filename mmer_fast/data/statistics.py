"""Statistics of features over the units that count."""

from __future__ import annotations

import numpy as np

from mmer_fast.data.large_arrays import blocks


def feature_statistics(features_ntf: np.ndarray, lengths_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (F,) float64 of every feature over the units before the lengths.

    Reads the array in blocks, so that a mapped file need not fit into memory; blocks are merged as in Chan et al. 1979.
    Without any unit they are 0 and 0.
    """
    count, size = 0, features_ntf.shape[2]
    mean_f, squares_f = np.zeros(size), np.zeros(size)
    for block in blocks(features_ntf):
        valid_nt = np.arange(features_ntf.shape[1]) < lengths_n[block, None]
        units_uf = features_ntf[block][valid_nt].astype(np.float64)
        if len(units_uf) == 0:
            continue
        total = count + len(units_uf)
        block_mean_f = units_uf.mean(axis=0)
        shift_f = block_mean_f - mean_f
        squares_f += ((units_uf - block_mean_f) ** 2).sum(axis=0) + shift_f**2 * (count * len(units_uf) / total)
        mean_f += shift_f * (len(units_uf) / total)
        count = total
    return mean_f, np.sqrt(squares_f / max(count, 1))

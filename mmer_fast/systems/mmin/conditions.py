"""Which modalities are available: the conditions that MMIN is trained and tested under.

Shape suffixes: c conditions, m modalities, b batch, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from mmer_fast.data import DataError, Split


def missing_conditions(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """The 2^M - 2 conditions in which something is missing and something is available, as the available modalities.

    In the order of the talk's table: one modality, then two, ...; within these as in `modalities`.
    """
    return [available for count in range(1, len(modalities)) for available in combinations(modalities, count)]


def condition_masks(modalities: Sequence[str], conditions: Sequence[Sequence[str]]) -> Tensor:
    """(C, M) bool: which of the modalities each condition has."""
    rows = [[name in available for name in modalities] for available in conditions]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(modalities))


def unified(embeddings_bmd: Tensor, available_bcm: Tensor, absent_md: Tensor) -> Tensor:
    """Every sample under several conditions, in one format: (B C, M D), the conditions of a sample in a row.

    The talk's unified triplets (x^a, x^v_miss, x^t_miss), ...: what is missing is replaced, not left out. With the
    complement of `available_bcm` it is the other half of the pair.

    Args:
        embeddings_bmd: (B, M, D).
        available_bcm: (B, C, M) bool.
        absent_md: (M, D), the embedding of a modality that is missing.
    """
    kept_bcmd = torch.where(available_bcm[..., None], embeddings_bmd[:, None], absent_md)
    return kept_bcmd.flatten(0, 1).flatten(1)


def restricted(split: Split, available: Sequence[str]) -> Split:
    """The same samples with only these modalities: the others are there and empty (length 0).

    Raises:
        DataError: a name is no modality of the split.
    """
    unknown = [name for name in available if name not in split.features]
    if unknown:
        raise DataError(f"modalities: expected some of {', '.join(split.features)}; got {', '.join(unknown)}")
    features, lengths = dict(split.features), dict(split.lengths)
    for name in split.features:
        if name not in available:
            features[name] = np.zeros((len(split), 1, split.features[name].shape[2]), dtype=np.float32)
            lengths[name] = np.zeros(len(split), dtype=np.int64)
    return Split(features, lengths, split.labels, split.extras)

"""UniVA's emotion correlation prior: emotions that are close in valence and arousal are predicted alike.

Zheng et al. 2024, module 3 of the slides: `squared_difference_prior`, with emotions as points of the NRC-VAD lexicon.
The published code has other norms (`column_norm_prior`), and makes M a parameter. Those norms are at least 0, so the
gradient of M is too: with it M only ever falls, and η has no lower bound.

Shape suffixes: b samples, j k l emotions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.data.valence_arousal import NRC_VAD
from mmer_fast.ops import _validate


def emotion_va(names: Sequence[str], values: Mapping[str, Sequence[float]] | None = None) -> Tensor:
    """(K, 2) float64: valence and arousal of emotions, in [0, 1].

    Args:
        names: of K emotions.
        values: name → (valence, arousal), for names that `NRC_VAD` lacks; they win over its values.

    Raises:
        ValueError: a name without values, or values that are not two numbers.
    """
    known = {**NRC_VAD, **(values or {})}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"names must have valence and arousal, got {', '.join(missing)} without; known: {', '.join(known)}. "
            "Give them as values, name → (valence, arousal)"
        )
    for name in names:
        pair = known[name]
        numbers = isinstance(pair, (list, tuple)) and all(type(x) in (int, float) for x in pair)
        if not numbers or len(pair) != 2:
            raise ValueError(f"values[{name!r}] must be valence and arousal, two numbers, got {pair!r}")
    return torch.tensor([list(known[name]) for name in names], dtype=torch.float64).reshape(-1, 2)


def emotion_similarity(va_k2: Tensor) -> Tensor:
    """M (K, K): cosines of emotions as points of the plane, each column scaled to [−1, 1] by its least and largest.

    The slides have no scale; the published matrices have this one. An emotion in the centre of the plane has no
    direction: its similarities are 0.

    Args:
        va_k2: (K, 2) floating, valence and arousal of K emotions.

    Raises:
        TypeError: `va_k2` is not floating.
        ValueError: another shape, or all emotions have one valence or one arousal, which leaves no scale.
    """
    _validate.floating_tensor("va_k2", va_k2)
    if va_k2.dim() != 2 or va_k2.shape[1] != 2 or len(va_k2) == 0:
        raise ValueError(f"va_k2 must have shape (K, 2) with K >= 1, got {tuple(va_k2.shape)}")
    low_2, high_2 = va_k2.aminmax(dim=0)
    if not bool((high_2 > low_2).all()):
        raise ValueError(f"va_k2 must differ among emotions in valence and in arousal, got {va_k2.tolist()}")
    scaled_k2 = (va_k2 - low_2) / (high_2 - low_2) * 2 - 1
    directions_k2 = F.normalize(scaled_k2, dim=1)
    return directions_k2 @ directions_k2.T


def squared_difference_prior(predictions_bk: Tensor, similarity_kk: Tensor) -> Tensor:
    """η of the slides, (): Σ_i Σ_{j,l} M_jl (ŷ_ij − ŷ_il)² / B. For B = 0 it is 0.

    Args:
        predictions_bk: (B, K) floating, probabilities ŷ.
        similarity_kk: M, (K, K) floating.

    Raises:
        TypeError, ValueError: an argument of another dtype or shape.
    """
    differences_bkk = _differences(predictions_bk, similarity_kk)
    return (similarity_kk * differences_bkk.square()).sum() / max(len(predictions_bk), 1)


def column_norm_prior(predictions_bk: Tensor, similarity_kk: Tensor) -> Tensor:
    """η of the published code, (): Σ_{j,l} M_jl ‖ŷ_·j − ŷ_·l‖₂ / B, norms over the batch, not squared.

    So it depends on how samples are batched: a batch that is repeated n times has 1/√n of it. Where two columns are
    equal the gradient of their norm is taken as 0.

    Args:
        predictions_bk: (B, K) floating; there the logarithms of a softmax.
        similarity_kk: M, (K, K) floating.

    Raises:
        TypeError, ValueError: an argument of another dtype or shape.
    """
    norms_kk = torch.linalg.vector_norm(_differences(predictions_bk, similarity_kk), dim=0)
    return (similarity_kk * norms_kk).sum() / max(len(predictions_bk), 1)


def _differences(predictions_bk: Tensor, similarity_kk: Tensor) -> Tensor:
    """(B, K, K): ŷ_ij − ŷ_il."""
    _validate.floating_tensor("predictions_bk", predictions_bk)
    _validate.floating_tensor("similarity_kk", similarity_kk)
    if predictions_bk.dim() != 2:
        raise ValueError(f"predictions_bk must have shape (B, K), got {tuple(predictions_bk.shape)}")
    k = predictions_bk.shape[1]
    if similarity_kk.shape != (k, k):
        raise ValueError(f"similarity_kk must have shape ({k}, {k}), got {tuple(similarity_kk.shape)}")
    return predictions_bk[:, :, None] - predictions_bk[:, None, :]

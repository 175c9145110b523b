"""The soft temporal mask of adversarial temporal masking (ATM), RobMMR Eq. 7 and 9."""

from __future__ import annotations

from torch import Tensor

from mmer_fast.ops import _validate
from mmer_fast.ops.soft_topk import soft_topk


def temporal_mask(
    scores: Tensor,
    ratio: float = 0.4,
    *,
    k: int | float | Tensor | None = None,
    epsilon: float | Tensor = 0.1,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    largest: bool = True,
    normalizer: float | str = 1.0,
    solver: str = "newton",
    iterations: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The soft mask of adversarial temporal masking: near 0 on the k highest scores, near 1 elsewhere, 0 on padding.

    ``m = 1 - T``, T of `soft_topk` (RobMMR Eq. 7), computed as the plan's other column (Eq. 9): the soft choice of the
    ``n - k`` lowest scores. So a row sums to ``n - k``, and no digit of ``1 - T`` is lost.

    Args:
        scores: ``(..., n)``, as in `soft_topk`; finite.
        ratio: share of each row's own length that is masked, in [0, 1] (the paper: 0.4).
        k: the number of masked entries instead, as in `soft_topk`.
        largest: False masks the k lowest scores, as the published code does.
        epsilon, lengths, mask, normalizer, solver, iterations, backend: as in `soft_topk`.

    Returns:
        Mask ``(..., n)`` in the dtype of `scores`.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in `soft_topk`.
    """
    _validate.dense_tensor("scores", scores)
    if scores.dim() == 0:
        raise ValueError("scores must have at least one dimension (..., n), got a scalar")
    _validate.ragged(scores, lengths, mask)
    _validate.flag("largest", largest)
    share = _validate.number("ratio", ratio, minimum=0.0, maximum=1.0)
    n: float | Tensor = scores.shape[-1]
    if lengths is not None:
        n = lengths.double()
    elif mask is not None:
        n = mask.sum(-1).double()
    if k is None:
        kept = n * (1.0 - share)
    else:
        k_row, k_value = _validate.row_number("k", k, scores, minimum=0.0, maximum=scores.shape[-1])
        _validate.counts_within(k_row, k_value, lengths, mask)
        kept = n - (k_value if k_row is None else k_row.reshape(scores.shape[:-1]))
    weights = soft_topk(
        scores,
        kept,
        epsilon=epsilon,
        lengths=lengths,
        mask=mask,
        largest=not largest,
        normalizer=normalizer,
        solver=solver,
        iterations=iterations,
        backend=backend,
    )
    assert isinstance(weights, Tensor)
    return weights

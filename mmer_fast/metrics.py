"""Metrics: the multi-label ones of the paper's tables and of later papers, and those of data with one class a sample.

Counting metrics come from torchmetrics. Two are computed here, since its definitions differ: the
example-based Jaccard index with a stated convention for empty unions, and the weighted accuracy of the MOSEI
literature.
Shapes: N samples, K labels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_f1_score,
    multiclass_recall,
    multilabel_average_precision,
    multilabel_f1_score,
    multilabel_hamming_distance,
    multilabel_precision,
    multilabel_recall,
)


def multilabel_metrics(
    probabilities: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    threshold: float = 0.5,
    empty_union: float = 0.0,
    predictions: Tensor | np.ndarray | None = None,
) -> dict[str, Any]:
    """Compare predicted probabilities with multi-hot labels.

    A label is predicted where its probability lies above ``threshold``. Precision, recall and F1 are 0 where they
    would be 0/0; F1 for a label that is neither present nor predicted anywhere.

    Args:
        probabilities: (N, K) floating, in [0, 1].
        labels: (N, K), any dtype, holding only 0 and 1.
        threshold: in [0, 1].
        empty_union: in [0, 1], what a sample counts in ``accuracy`` when it has no label and none is
            predicted; the authors' code says 0, scikit-learn's ``zero_division=1`` would say 1.
        predictions: (N, K) bool, the labels that are predicted in place of those above ``threshold``.

    Returns:
        Python floats under

        - ``accuracy``: example-based Jaccard index, mean over samples of |Y and Y'| / |Y or Y'| (RobMMR's
          Acc);
        - ``hamming_loss``: share of the N K decisions that are wrong;
        - ``micro_precision``, ``micro_recall``: share of the predicted labels that are there, and of the labels there
          that are predicted, over all decisions;
        - ``micro_f1``, ``macro_f1``: F1 over all decisions, and the mean of the labels' F1;
        - ``weighted_accuracy``: mean over labels of (TP/P + TN/Q)/2, with P positive and Q negative samples
          of the label; for a label with P = 0 or Q = 0 only the other ratio counts;
        - ``mean_average_precision``: mean average precision of the labels that have a positive sample, NaN if
          none has;

        and under ``per_label_f1`` a list of K floats.

    Raises:
        TypeError: an argument is neither a tensor nor an array, or ``probabilities`` is not floating.
        ValueError: shapes differ, are not (N >= 1, K >= 1), or a value is not finite or outside its range.
    """
    p_nk, y_nk = _validate(probabilities, labels, threshold, empty_union)
    predicted_nk = p_nk > threshold if predictions is None else _predictions(predictions, p_nk)
    counts: dict[str, Any] = {"num_labels": p_nk.shape[1], "validate_args": False}
    decisions = predicted_nk.long(), y_nk.long()
    f1_k = multilabel_f1_score(*decisions, average="none", **counts).reshape(-1)
    return {
        "accuracy": _example_jaccard(predicted_nk, y_nk, empty_union),
        "hamming_loss": multilabel_hamming_distance(*decisions, average="micro", **counts).item(),
        "micro_precision": multilabel_precision(*decisions, average="micro", **counts).item(),
        "micro_recall": multilabel_recall(*decisions, average="micro", **counts).item(),
        "micro_f1": multilabel_f1_score(*decisions, average="micro", **counts).item(),
        "macro_f1": f1_k.mean().item(),
        "per_label_f1": f1_k.tolist(),
        "weighted_accuracy": _weighted_accuracy(predicted_nk, y_nk),
        "mean_average_precision": _mean_average_precision(p_nk, y_nk),
    }


def single_label_metrics(probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> dict[str, float]:
    """Compare predicted probabilities with the one class that each sample has.

    The class with the highest probability is predicted, the first of several. Precision, recall and F1 are 0 where they
    would be 0/0.

    Args:
        probabilities: (N, K) floating, in [0, 1].
        labels: (N, K), any dtype, holding one 1 a row and else 0.

    Returns:
        Python floats under

        - ``weighted_f1``: mean of the classes' F1, each weighted with its number of samples;
        - ``overall_accuracy``: share of the samples whose class is predicted (the weighted accuracy WA of the
          literature on emotions in conversation: the mean of the classes' recalls, weighted likewise);
        - ``unweighted_accuracy``: mean recall of the classes that have samples (UA).

    Raises:
        TypeError, ValueError: as `multilabel_metrics`, and ValueError where a row has no class or several.
    """
    p_nk, y_nk = _validate(probabilities, labels, 0.5, 0.0)
    several_n = y_nk.sum(dim=1) != 1
    if several_n.any():
        row = int(several_n.nonzero()[0])
        raise ValueError(f"labels: expected one class a sample; got {int(y_nk[row].sum())} in row {row}")
    predicted_n, class_n = p_nk.argmax(dim=1), y_nk.long().argmax(dim=1)
    classes: dict[str, Any] = {"num_classes": p_nk.shape[1], "validate_args": False}
    recall_k = multiclass_recall(predicted_n, class_n, average="none", **classes)
    return {
        "weighted_f1": multiclass_f1_score(predicted_n, class_n, average="weighted", **classes).item(),
        "overall_accuracy": (predicted_n == class_n).double().mean().item(),
        "unweighted_accuracy": recall_k[y_nk.any(dim=0)].mean().item(),
    }


def _validate(
    probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray, threshold: float, empty_union: float
) -> tuple[Tensor, Tensor]:
    for name, number in (("threshold", threshold), ("empty_union", empty_union)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: expected a value in [0, 1]; got {number}")
    p_nk, labels_nk = _as_tensor("probabilities", probabilities), _as_tensor("labels", labels)
    if not p_nk.is_floating_point():
        raise TypeError(f"probabilities: expected a floating dtype; got {p_nk.dtype}")
    if p_nk.ndim != 2 or 0 in p_nk.shape:
        raise ValueError(f"probabilities: expected shape (N >= 1, K >= 1); got {tuple(p_nk.shape)}")
    if labels_nk.shape != p_nk.shape:
        raise ValueError(
            f"labels: expected the shape of probabilities, {tuple(p_nk.shape)}; got {tuple(labels_nk.shape)}"
        )
    if not torch.isfinite(p_nk).all():
        raise ValueError(f"probabilities: expected finite values; got {int((~torch.isfinite(p_nk)).sum())} others")
    if p_nk.min() < 0 or p_nk.max() > 1:
        raise ValueError(f"probabilities: expected values in [0, 1]; got [{p_nk.min():g}, {p_nk.max():g}]")
    y_nk = labels_nk == 1
    wrong = labels_nk[~y_nk & (labels_nk != 0)]
    if wrong.numel():
        raise ValueError(f"labels: expected only 0 and 1; got {wrong[0].item()}")
    return p_nk, y_nk.to(p_nk.device)


def _predictions(predictions: Tensor | np.ndarray, p_nk: Tensor) -> Tensor:
    given_nk = _as_tensor("predictions", predictions)
    if given_nk.dtype != torch.bool or given_nk.shape != p_nk.shape:
        raise ValueError(
            f"predictions: expected bool of the shape of probabilities, {tuple(p_nk.shape)}; "
            f"got {given_nk.dtype} of shape {tuple(given_nk.shape)}"
        )
    return given_nk.to(p_nk.device)


def _as_tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())  # it may be read-only or go backwards
    if isinstance(value, Tensor):
        return value.detach()
    raise TypeError(f"{name}: expected a torch.Tensor or numpy.ndarray; got {type(value).__name__}")


def _example_jaccard(predicted_nk: Tensor, y_nk: Tensor, empty_union: float) -> float:
    both_n = (predicted_nk & y_nk).sum(dim=1).double()
    either_n = (predicted_nk | y_nk).sum(dim=1)
    return torch.where(either_n > 0, both_n / either_n.clamp(min=1), empty_union).mean().item()


def _weighted_accuracy(predicted_nk: Tensor, y_nk: Tensor) -> float:
    recalls = [
        (predicted_nk == y_nk).logical_and(kind_nk).sum(dim=0).double() / kind_nk.sum(dim=0)  # 0/0 = NaN, left out
        for kind_nk in (y_nk, ~y_nk)
    ]
    return torch.stack(recalls).nanmean(dim=0).mean().item()


def _mean_average_precision(p_nk: Tensor, y_nk: Tensor) -> float:
    present_k = y_nk.any(dim=0)
    n_present = int(present_k.sum())
    if n_present == 0:
        return math.nan
    present = p_nk[:, present_k], y_nk[:, present_k].long()
    return multilabel_average_precision(*present, num_labels=n_present, average="macro", validate_args=False).item()

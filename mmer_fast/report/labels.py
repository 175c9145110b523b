"""Results of each label: how frequent it is and how well it is found.

Counting metrics come from torchmetrics; what would be 0/0 is None, where `mmer_fast.metrics` has NaN, 0 or leaves it
out. Shapes: N samples, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_stat_scores

from mmer_fast.models.outputs import LABELS, Outputs
from mmer_fast.report.page import Content, Html, number, table, tag


@dataclass(frozen=True)
class LabelResult:
    """One label on one split; every value but `prevalence` and `f1` is None where it is not defined.

    Attributes:
        name: of the label.
        prevalence: share of the samples that have it.
        precision: TP / (TP + FP); None if it is never predicted.
        recall: TP / (TP + FN); None if no sample has it.
        f1: 2 TP / (2 TP + FP + FN), 0 where that is 0/0, as in the macro-F1.
        weighted_accuracy: (TP/P + TN/Q) / 2 with P samples that have the label and Q that do not; for P = 0 or Q = 0
            the other ratio, as in `multilabel_metrics`.
        average_precision: None if no sample has it.
    """

    name: str
    prevalence: float
    precision: float | None
    recall: float | None
    f1: float
    weighted_accuracy: float
    average_precision: float | None


def label_results(
    probabilities_nk: Tensor,
    labels_nk: Tensor,
    names: Sequence[str],
    threshold: float,
    outputs: Outputs = LABELS,
) -> list[LabelResult]:
    """Results of every label.

    Args:
        probabilities_nk: (N >= 1, K) floating, in [0, 1].
        labels_nk: (N, K), 0 or 1.
        names: K.
        threshold: a label is predicted where its probability lies above, unless `outputs` chooses one class.
        outputs: of the model: how probabilities become predictions.
    """
    counts: dict[str, Any] = {"num_labels": len(names), "validate_args": False}
    predicted_nk, y_nk = outputs.predictions(probabilities_nk, threshold).long(), labels_nk.long()
    scores_k5 = multilabel_stat_scores(predicted_nk, y_nk, average="none", **counts).reshape(len(names), 5)
    average_precisions = _average_precisions(probabilities_nk, y_nk)
    results = []
    for name, (tp, fp, tn, fn, _), ap in zip(names, scores_k5.tolist(), average_precisions, strict=True):
        recalls = [r for r in (_ratio(tp, tp + fn), _ratio(tn, tn + fp)) if r is not None]
        results.append(
            LabelResult(
                name,
                prevalence=(tp + fn) / len(y_nk),
                precision=_ratio(tp, tp + fp),
                recall=_ratio(tp, tp + fn),
                f1=2 * tp / max(2 * tp + fp + fn, 1),
                weighted_accuracy=sum(recalls) / len(recalls),
                average_precision=ap,
            )
        )
    return results


def _average_precisions(probabilities_nk: Tensor, y_nk: Tensor) -> list[float | None]:
    """Average precision of every label, None for one without a positive sample."""
    present = y_nk.any(dim=0).tolist()
    if not any(present):
        return [None] * len(present)
    values = multilabel_average_precision(
        probabilities_nk[:, present], y_nk[:, present], num_labels=sum(present), average="none", validate_args=False
    )
    found = iter(values.reshape(-1).tolist())
    return [next(found) if here else None for here in present]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def labels_table(results: Sequence[LabelResult]) -> Html:
    """The results as a table."""
    header = ("label", "share", "prec.", "recall", "F1", "w. acc.", "AP")
    return table(header, [_row(result) for result in results])


def _row(result: LabelResult) -> list[Content]:
    values = (result.precision, result.recall, result.f1, result.weighted_accuracy, result.average_precision)
    share = f"{100 * result.prevalence:.0f} %"
    return [tag("span", result.name), share, *map(number, values)]

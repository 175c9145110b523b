"""The talk's table: one model under every combination of modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmer_fast.data import Split
from mmer_fast.metrics import multilabel_metrics, single_label_metrics
from mmer_fast.models.network import Network
from mmer_fast.models.outputs import CLASSES
from mmer_fast.systems.mmin.conditions import missing_conditions, restricted
from mmer_fast.training.evaluate import predict_probabilities

CLASS_METRICS = {"overall_accuracy": "WA", "unweighted_accuracy": "UA"}
LABEL_METRICS = {"micro_f1": "miF1", "macro_f1": "maF1"}


@dataclass(frozen=True)
class ConditionTable:
    """Metrics of a model under the conditions of its modalities.

    Attributes:
        modalities: all of them.
        missing: available modalities → metrics, of the conditions in which something is missing.
        average: the means of these.
        full: with all modalities.
        titles: metric → its short name.
    """

    modalities: Sequence[str]
    missing: Mapping[tuple[str, ...], Mapping[str, float]]
    average: Mapping[str, float]
    full: Mapping[str, float]
    titles: Mapping[str, str]

    def columns(self) -> dict[str, Mapping[str, float]]:
        """Title → metrics, in the order of the talk; JSON data."""
        conditions = {"+".join(available): metrics for available, metrics in self.missing.items()}
        return {**conditions, "average": self.average, "+".join(self.modalities): self.full}

    def markdown(self) -> str:
        """The table with a row a metric, as Markdown."""
        columns = self.columns()
        lines = [["", *columns], ["---"] * (len(columns) + 1)]
        for metric, title in self.titles.items():
            lines.append([title, *(f"{metrics[metric]:.3f}" for metrics in columns.values())])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def evaluate_conditions(
    model: Network, split: Split, *, threshold: float = 0.5, batch_size: int = 256
) -> ConditionTable:
    """Test a model on the same samples with all modalities, and without some of them.

    Any network will do, RobMMR too: a length of 0 is a missing modality. Leaves the model in eval mode.

    Args:
        model: on its device.
        split: modalities that a sample lacks of itself stay missing.
        threshold: of labels; classes have none.
        batch_size: samples that are computed at a time.

    Returns:
        WA and UA (`single_label_metrics`) of a model whose outputs are classes; of others micro and macro F1.
    """
    modalities = list(model.modalities)
    titles = CLASS_METRICS if model.outputs == CLASSES else LABEL_METRICS
    results = {
        available: _metrics(model, restricted(split, available), threshold, batch_size)
        for available in [*missing_conditions(modalities), tuple(modalities)]
    }
    full = results.pop(tuple(modalities))
    average = {key: _mean([metrics[key] for metrics in results.values()]) for key in titles}
    return ConditionTable(modalities, results, average, full, titles)


def _metrics(model: Network, split: Split, threshold: float, batch_size: int) -> dict[str, float]:
    probabilities_nk = predict_probabilities(model, split, batch_size)
    if model.outputs == CLASSES:
        metrics = single_label_metrics(probabilities_nk, split.labels)
        return {key: metrics[key] for key in CLASS_METRICS}
    metrics = multilabel_metrics(probabilities_nk, split.labels, threshold=threshold)
    return {key: metrics[key] for key in LABEL_METRICS}


def _mean(values: list[float]) -> float:
    """Of a single modality there is no missing condition: NaN."""
    return sum(values) / len(values) if values else float("nan")

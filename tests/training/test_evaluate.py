"""Evaluation: order of the samples, subsets, and recall of planted units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_training import small_data, small_model
from torch import Tensor

from mmer_fast.data import Split
from mmer_fast.metrics import multilabel_metrics
from mmer_fast.models.losses import binary_cross_entropy
from mmer_fast.training.evaluate import evaluate, mask_recall, predict_logits, predict_probabilities


def test_probabilities_come_in_the_order_of_the_split() -> None:
    data = small_data()
    model, split = small_model(data).eval(), data.splits["test"]
    together = predict_probabilities(model, split, batch_size=7)
    assert together.shape == (20, 6)
    for i in range(len(split)):
        features = {name: torch.from_numpy(x[i : i + 1]) for name, x in split.features.items()}
        lengths = {name: torch.from_numpy(x[i : i + 1]) for name, x in split.lengths.items()}
        with torch.no_grad():
            alone = model(features, lengths).logits.sigmoid()[0]
        torch.testing.assert_close(together[i], alone)


def test_metrics_of_subsets_are_those_of_their_samples() -> None:
    data = small_data()
    model, split = small_model(data), data.splits["test"]
    result = evaluate(model, split)
    probabilities = predict_probabilities(model, split)
    assert result["samples"] == 20
    assert sum(subset["samples"] for subset in result["shift"].values()) == 20
    for value, subset in result["shift"].items():
        chosen = split.extras["shift"] == int(value)
        expected = multilabel_metrics(probabilities[torch.from_numpy(chosen)], split.labels[chosen])
        assert subset["micro_f1"] == expected["micro_f1"]
    assert "shift" not in evaluate(model, data.splits["valid"])


def test_the_loss_is_that_of_all_samples_together() -> None:
    data = small_data()
    model, split = small_model(data), data.splits["test"]
    assert "recognition" not in evaluate(model, split)
    got = evaluate(model, split, batch_size=7, recognition_loss=binary_cross_entropy)["recognition"]
    logits, labels = predict_logits(model, split), torch.from_numpy(split.labels).float()
    assert got == pytest.approx(binary_cross_entropy(logits, labels).item(), rel=1e-6)


class ModelWithScores(torch.nn.Module):
    """A stand-in whose mask scores are the features themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.modalities = {"a": 1, "b": 1}
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def encode(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple:
        return features, lengths

    def temporal_masks(self, encodings: tuple) -> dict[str, Tensor]:
        features, lengths = encodings
        masks = {}
        for name, x_bt1 in features.items():
            mask_bt = torch.zeros(x_bt1.shape[:2])
            for b, n in enumerate(lengths[name].tolist()):
                mask_bt[b, :n] = 1
                mask_bt[b, x_bt1[b, :n, 0].topk(round(0.5 * n)).indices] = 0
            masks[name] = mask_bt
        return masks


def test_recall_counts_planted_units_among_the_masked() -> None:
    scores = np.array([[9, 8, 1, 1], [1, 9, 0, 0], [5, 5, 5, 9], [0, 0, 0, 0]], dtype=np.float32)[..., None]
    planted = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    lengths = np.array([4, 2, 4, 0])
    split = Split(
        {"a": scores, "b": scores},
        {"a": lengths, "b": lengths},
        np.zeros((4, 2), dtype=np.uint8),
        {"planted_a": planted},
    )
    # sample 0: 1 of its 2 planted units is among the 2 masked of 4; sample 1: 1 of 1 among 1 of 2
    result = mask_recall(ModelWithScores(), split)  # type: ignore[arg-type]
    assert result == {"a": {"recall": pytest.approx(0.75), "chance": pytest.approx(0.5), "samples": 2}}


def test_recall_masks_one_unit_at_least_and_counts_none_beyond_the_length() -> None:
    x, lengths = np.ones((2, 3, 1), dtype=np.float32), np.array([1, 3])
    planted = np.array([[1, 1, 0], [0, 0, 0]], dtype=bool)
    split = Split(
        {"a": x, "b": x}, {"a": lengths, "b": lengths}, np.zeros((2, 2), dtype=np.uint8), {"planted_a": planted}
    )
    result = mask_recall(ModelWithScores(), split)  # type: ignore[arg-type]
    assert result == {"a": {"recall": 1.0, "chance": 1.0, "samples": 1}}


def test_recall_of_an_untrained_model_is_near_chance() -> None:
    data = small_data(n_valid=200)
    result = mask_recall(small_model(data), data.splits["valid"])
    for values in result.values():
        assert values["chance"] == pytest.approx(0.4, abs=0.06)
        assert abs(values["recall"] - values["chance"]) < 0.2

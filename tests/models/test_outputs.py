"""What logits mean: labels by themselves, or one class."""

from __future__ import annotations

import torch

from mmer_fast.models.outputs import CLASSES, LABELS, Outputs

LOGITS = torch.tensor([[0.0, 1.0, -1.0], [2.0, 2.0, 0.0]])


def test_labels_are_predicted_above_the_threshold() -> None:
    assert LABELS.predictions(LABELS.probabilities(LOGITS), 0.5).tolist() == [[False, True, False], [True, True, False]]


def test_the_first_of_the_most_probable_classes_is_predicted_whatever_the_threshold() -> None:
    probabilities = CLASSES.probabilities(LOGITS)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2))
    assert CLASSES.predictions(probabilities, 0.9).tolist() == [[False, True, False], [True, False, False]]


def test_labels_may_share_one_softmax() -> None:
    shared = Outputs("softmax", "threshold")
    assert shared.predictions(shared.probabilities(LOGITS), 0.3).tolist() == [[False, True, False], [True, True, False]]

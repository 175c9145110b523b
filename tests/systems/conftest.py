"""Data that each system can be trained on, and what every system has to beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mmer_fast.data import MultiModalData, Split, make_synthetic
from mmer_fast.data.dialogues import make_dialogues
from mmer_fast.metrics import multilabel_metrics
from mmer_fast.systems.adaptation import hide_labels

CONVERSATIONS = ("mmgcn", "mmin", "cross-culture", "semi-supervised")
"""Systems whose presets want one class a sample, and dialogues."""


@pytest.fixture(scope="session")
def data_of() -> Callable[[str], MultiModalData]:
    """Small data that the presets of the system of that name can be trained on."""
    labels = make_synthetic(0, n_train=40, n_valid=4, n_test=8, max_length=9)
    conversations = hide_labels(make_dialogues(0, n_train=8, n_valid=2, n_test=3), 0.5)
    return lambda name: conversations if name in CONVERSATIONS else labels


def _constant_f1(split: Split) -> float:
    labels_nk = split.labels
    prevalent = labels_nk.mean(axis=0).argsort()[::-1]
    answers = [np.isin(range(labels_nk.shape[1]), prevalent[:count]) for count in range(1, labels_nk.shape[1] + 1)]
    answers_nk = [np.tile(answer.astype(float), (len(labels_nk), 1)) for answer in answers]
    return max(multilabel_metrics(answer_nk, labels_nk)["micro_f1"] for answer_nk in answers_nk)


@pytest.fixture
def constant_f1() -> Callable[[Split], float]:
    """The best micro-F1 on a split of an answer that is the same for all its samples."""
    return _constant_f1

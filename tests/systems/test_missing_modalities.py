"""Every system copes with a file that lacks modalities, as where each sample does, and with one without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mmer_fast.data import MultiModalData, no_labels
from mmer_fast.systems.mmin import restricted
from mmer_fast.systems.registry import NAMES
from mmer_fast.training.evaluate import predict_probabilities
from mmer_fast.training.missing import data_for
from mmer_fast.training.systems import find_system


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_those_of_samples_without_the_modality_or_labels(
    name: str, data_of: Callable[[str], MultiModalData]
) -> None:
    data = data_of(name)
    kind = find_system(name)
    config, train = kind.preset("compact")
    kind.check_data(data, config, train)
    torch.manual_seed(0)
    model = kind.build(data.modalities, len(data.label_names), config)
    model.fit(data.splits["train"])
    for kept in (["audio"], ["video", "text"]):
        got, notes = data_for(model.modalities, data.select(kept))
        assert [note.split()[0] for note in notes] == [name for name in data.modalities if name not in kept]
        assert got.check().modalities == data.modalities
        probabilities_nk = predict_probabilities(model, got.splits["test"])
        assert probabilities_nk.isfinite().all()
        assert torch.equal(probabilities_nk, predict_probabilities(model, restricted(data.splits["test"], kept)))
    assert data_for(model.modalities, data)[1] == []
    test = data.splits["test"]
    probabilities_nk = predict_probabilities(model, replace(test, labels=no_labels(len(test))))
    assert torch.equal(probabilities_nk, predict_probabilities(model, test))

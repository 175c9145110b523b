"""UniVA learns the embedded data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from small_univa import batch_of

from mmer_fast.data import Batch, MultiModalData, SequenceDataset, Split, make_synthetic
from mmer_fast.metrics import multilabel_metrics
from mmer_fast.models.config import config_from_dict
from mmer_fast.systems.univa import (
    UniVA,
    UniVAConfig,
)


def batches(data: MultiModalData, seed: int) -> Iterator[Batch]:
    train = SequenceDataset(data.splits["train"], [f"va_{name}" for name in data.modalities])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(order), 32):
        yield train.__getitems__(order[start : start + 32])


@pytest.mark.parametrize("recognition", ["softmax_kl", "bce"])
def test_it_learns(recognition: str, constant_f1: Callable[[Split], float]) -> None:
    data = make_synthetic(0, n_train=600, n_valid=200, n_test=1, max_length=20)
    config = {**UniVA.presets["compact"].model, "dim": 32, "ffn_dim": 32, "recognition": recognition}
    if recognition == "bce":
        config["recognition_scale"] = 100.0
    torch.manual_seed(0)
    model = UniVA(data.modalities, 6, config_from_dict(UniVAConfig, config))
    model.check_data(data, model.config)
    model.fit(data.splits["train"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(6):
        for batch in batches(data, epoch):
            optimizer.zero_grad()
            model.objective(batch).total.backward()
            optimizer.step()
    model.eval()
    valid = batch_of(data, "valid")
    with torch.no_grad():
        probabilities = model.outputs.probabilities(model.logits(valid))
    threshold = 0.18 if recognition == "softmax_kl" else 0.5
    got = multilabel_metrics(probabilities, valid.labels, threshold=threshold)["micro_f1"]
    assert got > constant_f1(data.splits["valid"]) + 0.1

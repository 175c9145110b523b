"""A small UniVA, data for it, and a batch."""

from __future__ import annotations

from typing import Any

import torch

from mmer_fast.data import Batch, MultiModalData, SequenceDataset, make_synthetic
from mmer_fast.systems.univa import UniVA, UniVAConfig

NAMES = ("text", "video", "audio")
SMALL: dict[str, Any] = {
    "dim": 12,
    "ffn_dim": 16,
    "heads": 2,
    "blocks": 1,
    "max_length": 8,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "classifier_dropout": 0.0,
}


def small_config(**changes: Any) -> UniVAConfig:
    return UniVAConfig(**{**SMALL, **changes})


def small_data() -> MultiModalData:
    """In its test split some samples lack text."""
    return make_synthetic(2, n_train=40, n_valid=10, n_test=20, max_length=8)


def built(data: MultiModalData, **changes: Any) -> UniVA:
    torch.manual_seed(0)
    model = UniVA(data.modalities, len(data.label_names), small_config(**changes))
    model.fit(data.splits["train"])
    return model


def batch_of(data: MultiModalData, split: str = "test") -> Batch:
    """All samples of a split."""
    dataset = SequenceDataset(data.splits[split], [f"va_{name}" for name in data.modalities])
    return dataset.__getitems__(list(range(len(dataset))))

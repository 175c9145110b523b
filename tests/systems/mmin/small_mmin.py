"""Small data with one class a sample, and a small MMIN."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mmer_fast.data import Batch, MultiModalData, SequenceDataset, Split
from mmer_fast.systems.mmin import MMIN, MMINConfig

MODALITIES = {"text": 5, "video": 3, "audio": 4}
CLASSES = 3
SMALL: dict[str, Any] = {
    "dim": 6,
    "channels": 4,
    "code_dim": 2,
    "blocks": 2,
    "classifier_dim": 8,
    "pretrain_epochs": 1,
    "text_dropout": 0.0,
    "dropout": 0.0,
}


def small_config(**changes: Any) -> MMINConfig:
    return MMINConfig(**{**SMALL, **changes})


def small_mmin(**changes: Any) -> MMIN:
    torch.manual_seed(0)
    return MMIN(MODALITIES, CLASSES, small_config(**changes)).double()


def small_data(n_train: int = 24, n_test: int = 12, signal: float = 2.0, seed: int = 0) -> MultiModalData:
    """Each modality shows the class in every unit, in noise."""
    rng = np.random.default_rng(seed)
    prototypes = {name: signal * rng.standard_normal((CLASSES, size)) for name, size in MODALITIES.items()}
    splits = {name: _split(rng, n, prototypes) for name, n in (("train", n_train), ("valid", n_test), ("test", n_test))}
    names = [f"class {k}" for k in range(CLASSES)]
    return MultiModalData(splits, names, dict(MODALITIES), "made for a test").check()


def _split(rng: np.random.Generator, n: int, prototypes: dict[str, np.ndarray]) -> Split:
    class_n = rng.integers(0, CLASSES, size=n)
    features, lengths = {}, {}
    for name, size in MODALITIES.items():
        lengths[name] = rng.integers(1, 8, size=n)
        x_ntd = rng.standard_normal((n, 7, size)) + prototypes[name][class_n][:, None]
        x_ntd[np.arange(7) >= lengths[name][:, None]] = 0
        features[name] = x_ntd.astype(np.float32)
    return Split(features, lengths, np.eye(CLASSES, dtype=np.uint8)[class_n])


def double_batch(split: Split, indices: list[int]) -> Batch:
    batch = SequenceDataset(split).__getitems__(indices)
    batch.features = {name: x.double() for name, x in batch.features.items()}
    batch.labels = batch.labels.double()
    return batch


def ragged_batch() -> Batch:
    """Six samples in float64, one lacking text, one lacking everything but audio."""
    batch = double_batch(small_data().splits["train"], list(range(6)))
    batch.lengths["text"][1] = 0
    batch.lengths["text"][4] = 0
    batch.lengths["video"][4] = 0
    return batch


def trained_mmin(data: MultiModalData, epochs: int = 30, **changes: Any) -> MMIN:
    """Trained with the whole training split as one batch an epoch."""
    torch.manual_seed(0)
    model = MMIN(MODALITIES, CLASSES, small_config(**changes))
    model.fit(data.splits["train"])
    split = data.splits["train"]
    batch = SequenceDataset(split).__getitems__(list(range(len(split))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for epoch in range(epochs):
        model.start_epoch(epoch)
        model.train()
        optimizer.zero_grad()
        model.objective(batch).total.backward()
        optimizer.step()
    return model

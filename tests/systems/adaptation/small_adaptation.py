"""Small data with one class a sample and two cultures, and small systems."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mmer_fast.data import Batch, MultiModalData, SequenceDataset, Split
from mmer_fast.systems.adaptation import CrossCulture, CrossCultureConfig, SemiSupervised, SemiSupervisedConfig

MODALITIES = {"text": 5, "audio": 4}
CLASSES = 3
SMALL: dict[str, Any] = {"dim": 6, "channels": 4, "fused_dim": 6, "text_dropout": 0.0, "dropout": 0.0}


def cross_culture(**changes: Any) -> CrossCulture:
    torch.manual_seed(0)
    return CrossCulture(MODALITIES, CLASSES, CrossCultureConfig(**{**SMALL, "cultures": 2, **changes})).double()


def semi_supervised(**changes: Any) -> SemiSupervised:
    torch.manual_seed(0)
    return SemiSupervised(MODALITIES, CLASSES, SemiSupervisedConfig(**{**SMALL, "latent_dim": 3, **changes})).double()


def small_data(n: int = 24, signal: float = 1.5, shift: float = 1.0) -> MultiModalData:
    """Each modality shows the class in every unit, in noise; cultures look like the difference of two classes."""
    rng = np.random.default_rng(0)
    classes = {name: signal * rng.standard_normal((CLASSES, size)) for name, size in MODALITIES.items()}
    halves = {name: shift * (shown[0] - shown[1]) / 2 for name, shown in classes.items()}
    cultures = {name: np.stack([half, -half]) for name, half in halves.items()}
    splits = {name: _split(rng, n, classes, cultures) for name in ("train", "valid", "test")}
    names = [f"class {k}" for k in range(CLASSES)]
    return MultiModalData(splits, names, dict(MODALITIES), "made for a test").check()


def _split(rng: np.random.Generator, n: int, classes: dict[str, np.ndarray], cultures: dict[str, np.ndarray]) -> Split:
    class_n, culture_n = rng.integers(0, CLASSES, size=n), rng.integers(0, 2, size=n)
    features, lengths = {}, {}
    for name, size in MODALITIES.items():
        lengths[name] = rng.integers(1, 7, size=n)
        shown_nd = classes[name][class_n] + cultures[name][culture_n]
        x_ntd = rng.standard_normal((n, 6, size)) + shown_nd[:, None]
        x_ntd[np.arange(6) >= lengths[name][:, None]] = 0
        features[name] = x_ntd.astype(np.float32)
    labelled_n = np.arange(n) % 3 == 0
    extras = {"culture": culture_n, "labelled": labelled_n}
    return Split(features, lengths, np.eye(CLASSES, dtype=np.uint8)[class_n], extras)


def batch_of(split: Split, indices: list[int]) -> Batch:
    """In float64, with culture and labelled."""
    batch = SequenceDataset(split, ("culture", "labelled")).__getitems__(indices)
    batch.features = {name: x.double() for name, x in batch.features.items()}
    return batch


def ragged_batch() -> Batch:
    """Eight samples, one lacking text, one lacking both."""
    batch = batch_of(small_data().splits["train"], list(range(8)))
    batch.lengths["text"][[1, 4]] = 0
    batch.lengths["audio"][4] = 0
    return batch

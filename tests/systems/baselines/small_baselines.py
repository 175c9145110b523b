"""Small networks of every baseline, in float64 and without dropout, and a ragged batch for them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from mmer_fast.data import Batch, MultiModalData, SequenceDataset, Split
from mmer_fast.systems.baselines import (
    HHMPN,
    LSTM,
    TAILOR,
    HHMPNConfig,
    LSTMConfig,
    MulT,
    MulTConfig,
    TAILORConfig,
)
from mmer_fast.systems.baselines.base import Baseline

MODALITIES = {"text": 5, "frames": 3, "sound": 4}
LABELS = 4
LENGTHS = {"text": [6, 3, 5, 0, 1], "frames": [2, 4, 0, 0, 3], "sound": [4, 4, 1, 0, 0]}

CONFIGS: dict[type[Baseline], Any] = {
    LSTM: LSTMConfig(dim=8),
    MulT: MulTConfig(dim=4, heads=2, levels=2),
    HHMPN: HHMPNConfig(dim=8, ffn_dim=12, heads=2, feature_layers=1, label_layers=2),
    TAILOR: TAILORConfig(dim=8, ffn_dim=12, heads=2, language_layers=2, unimodal_layers=1, cross_layers=1, dropout=0.1),
}
NETWORKS = list(CONFIGS)


def small_model(network: type[Baseline], **changes: Any) -> Baseline:
    """In float64, training mode and without dropout."""
    config = CONFIGS[network]
    off = {field.name: 0.0 for field in fields(config) if field.name.endswith("dropout")}
    torch.manual_seed(0)
    return network(MODALITIES, LABELS, replace(config, **{**off, **changes})).double()


def ragged_batch() -> Batch:
    """Five samples in float64: the fourth has no modality at all, others lack one or two."""
    generator = torch.Generator().manual_seed(1)
    features, lengths = {}, {}
    for name, size in MODALITIES.items():
        lengths[name] = torch.tensor(LENGTHS[name])
        longest = max(LENGTHS[name])
        x_btf = torch.randn(5, longest, size, dtype=torch.float64, generator=generator)
        padding_bt = torch.arange(longest) >= lengths[name][:, None]
        features[name] = x_btf.masked_fill(padding_bt[..., None], 0.0)
    labels = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.float64)
    return Batch(features, lengths, labels, torch.arange(5))


def learnable_data(samples: int = 40, seed: int = 0) -> MultiModalData:
    """Each label shifts one feature of one modality; every tenth sample lacks the sound."""
    rng = np.random.default_rng(seed)
    splits = {name: _split(rng, samples) for name in ("train", "valid", "test")}
    return MultiModalData(splits, ["one", "two", "three", "four"], dict(MODALITIES), "learnable").check()


def _split(rng: np.random.Generator, samples: int) -> Split:
    labels_nk = (rng.random((samples, LABELS)) < [0.6, 0.4, 0.3, 0.3]).astype(np.uint8)
    features, lengths = {}, {}
    for place, (name, size) in enumerate(MODALITIES.items()):
        lengths[name] = rng.integers(2, 7, samples)
        if name == "sound":
            lengths[name][::10] = 0
        x_ntf = rng.standard_normal((samples, 6, size))
        x_ntf[:, :, 0] += 3 * labels_nk[:, None, place]
        x_ntf[:, :, 1] += 3 * labels_nk[:, None, (place + 1) % LABELS]
        x_ntf[np.arange(6) >= lengths[name][:, None]] = 0
        features[name] = x_ntf.astype(np.float32)
    return Split(features, lengths, labels_nk)


def whole(split: Split) -> Batch:
    """All samples of a split."""
    return SequenceDataset(split).__getitems__(range(len(split)))

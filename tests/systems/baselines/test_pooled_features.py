"""Pooled features against their definition, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_baselines import MODALITIES, learnable_data, whole

from mmer_fast.data import Split, large_arrays
from mmer_fast.systems.baselines import Pooling


def written_out(split: Split, train: Split) -> np.ndarray:
    rows = []
    for i in range(len(split)):
        row = []
        for name in split.features:
            every = [own_units(train, name, n) for n in range(len(train))]
            units = np.concatenate(every)
            scale = units.mean(axis=0), units.std(axis=0)
            own = own_units(split, name, i)
            if len(own):
                row.append(described(own, *scale))
            else:
                row.append(np.mean([described(other, *scale) for other in every if len(other)], axis=0))
        rows.append(np.concatenate(row))
    return np.stack(rows)


def own_units(split: Split, name: str, sample: int) -> np.ndarray:
    return split.features[name][sample, : split.lengths[name][sample]].astype(np.float64)


def described(units: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    units = (units - mean) / deviation
    return np.concatenate([units.mean(axis=0), units.std(axis=0)])


def fitted(train: Split) -> Pooling:
    pooling = Pooling(MODALITIES)
    pooling.fit(train)
    return pooling


@pytest.mark.parametrize("block_bytes", [1, 32 << 20])
def test_against_the_definition(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_arrays, "BLOCK_BYTES", block_bytes)
    data = learnable_data(11)
    pooling = fitted(data.splits["train"])
    for split in data.splits.values():
        batch = whole(split)
        pooled = pooling(batch.features, batch.lengths)
        assert pooled.shape == (11, 2 * sum(MODALITIES.values()))
        np.testing.assert_allclose(pooled, written_out(split, data.splits["train"]), rtol=1e-9, atol=1e-12)


def test_padding_may_hold_anything() -> None:
    train = learnable_data(11).splits["train"]
    pooling, batch = fitted(train), whole(train)
    clean = pooling(batch.features, batch.lengths)
    for name, x_btf in batch.features.items():
        x_btf[torch.arange(x_btf.shape[1]) >= batch.lengths[name][:, None]] = torch.nan
    assert torch.equal(pooling(batch.features, batch.lengths), clean)


def test_a_feature_that_never_varies_and_a_modality_that_is_never_there() -> None:
    train = learnable_data(7).splits["train"]
    train.features["text"][:, :, 1] = np.where(np.arange(6) < train.lengths["text"][:, None], 4.0, 0.0)
    train.features["sound"][:], train.lengths["sound"][:] = 0, 0
    batch = whole(train)
    pooled = fitted(train)(batch.features, batch.lengths)
    assert pooled.isfinite().all()
    assert not pooled[:, 1].any()
    assert not pooled[:, -2 * MODALITIES["sound"] :].any()

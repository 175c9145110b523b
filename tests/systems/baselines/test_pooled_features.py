"""Pooled features against their definition, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
from small_baselines import MODALITIES, learnable_data

from mmer_fast.data import DataError, padding
from mmer_fast.systems.baselines import Pooling


def written_out(split, train) -> np.ndarray:
    rows = []
    for i in range(len(split)):
        row = []
        for name, x_ntf in split.features.items():
            units = np.concatenate([x[:n] for x, n in zip(train.features[name], train.lengths[name], strict=True)])
            units = units.astype(np.float64)
            own = (x_ntf[i, : split.lengths[name][i]] - units.mean(axis=0)) / units.std(axis=0)
            missing = np.zeros(x_ntf.shape[2])
            row += [own.mean(axis=0), own.std(axis=0)] if len(own) else [missing, missing]
        rows.append(np.concatenate(row))
    return np.stack(rows)


@pytest.mark.parametrize("block_bytes", [1, 32 << 20])
def test_against_the_definition(block_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(padding, "BLOCK_BYTES", block_bytes)
    data = learnable_data(11)
    pooling = Pooling.fit(data.splits["train"])
    for split in data.splits.values():
        pooled = pooling(split)
        assert pooled.shape == (11, 2 * sum(MODALITIES.values()))
        np.testing.assert_allclose(pooled, written_out(split, data.splits["train"]), rtol=1e-9, atol=1e-12)


def test_a_feature_that_never_varies_and_a_modality_that_is_never_there() -> None:
    data = learnable_data(7)
    train = data.splits["train"]
    train.features["text"][:, :, 1] = np.where(np.arange(6) < train.lengths["text"][:, None], 4.0, 0.0)
    train.features["sound"][:], train.lengths["sound"][:] = 0, 0
    pooled = Pooling.fit(train)(train)
    assert np.isfinite(pooled).all()
    assert not pooled[:, 1].any()
    assert not pooled[:, -2 * MODALITIES["sound"] :].any()


def test_other_modalities_are_refused() -> None:
    data = learnable_data(7)
    with pytest.raises(DataError, match=r"expected the modalities .*'text': 5.*; got \{'frames': 3\}"):
        Pooling.fit(data.splits["train"])(data.splits["valid"].select(["frames"]))

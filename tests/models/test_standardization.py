"""Standardisation: the statistics, what the model makes of them, and that a run keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_robmmr import MODALITIES, small_model

from mmer_fast.data import large_arrays, make_synthetic
from mmer_fast.data.statistics import feature_statistics
from mmer_fast.models.standardization import Standardization
from mmer_fast.training import train


@pytest.mark.parametrize("block_bytes", [64, 1 << 25])
def test_statistics_are_those_of_the_units_that_count(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(large_arrays, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    features = (1e3 + rng.standard_normal((9, 5, 3)) * [1.0, 1e-2, 0.0]).astype(np.float32)
    lengths = np.array([5, 0, 3, 1, 2, 5, 0, 4, 1])
    features[np.arange(5) >= lengths[:, None]] = np.nan
    units = features[np.arange(5) < lengths[:, None]].astype(np.float64)
    mean, deviation = feature_statistics(features, lengths)
    np.testing.assert_allclose(mean, units.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(deviation, units.std(axis=0), rtol=1e-9)


def test_without_a_unit_nothing_changes() -> None:
    layer = Standardization(2)
    layer.fit(*feature_statistics(np.ones((3, 4, 2), np.float32), np.zeros(3, np.int64)))
    x = torch.randn(5, 2)
    torch.testing.assert_close(layer(x), x, rtol=0, atol=0)


def test_a_constant_feature_keeps_its_scale() -> None:
    layer = Standardization(2)
    layer.fit(np.array([3.0, 1.0]), np.array([0.0, 4.0]))
    torch.testing.assert_close(layer(torch.tensor([[5.0, 5.0]])), torch.tensor([[2.0, 1.0]]))


def test_a_fitted_model_does_not_see_the_scale_of_the_features() -> None:
    rng = np.random.default_rng(0)
    lengths = {"words": np.array([6, 0, 2, 4]), "frames": np.array([1, 5, 5, 0])}
    drawn = {name: rng.standard_normal((4, 6, size)) for name, size in MODALITIES.items()}
    logits = []
    for factor, offset in ((1.0, 0.0), (250.0, -4000.0)):
        model = small_model(standardize=True).eval()
        features = {name: x * factor + offset for name, x in drawn.items()}
        for name, layer in model.standardization.items():
            layer.fit(*feature_statistics(features[name], lengths[name]))
        tensors = ({name: torch.from_numpy(x) for name, x in values.items()} for values in (features, lengths))
        logits.append(model(*tensors).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-9, atol=1e-9)


def test_a_run_keeps_what_was_fitted(tmp_path: Path) -> None:
    data = make_synthetic(0, n_train=20, n_valid=6, n_test=6, max_length=8).select(["audio"])
    sizes = {"dim": 8, "ffn_dim": 8, "heads": 2, "unimodal_blocks": 1, "multimodal_blocks": 1}
    run = train(data, tmp_path / "run", device="cpu", show=False, epochs=1, **sizes)
    mean, deviation = feature_statistics(data.splits["train"].features["audio"], data.splits["train"].lengths["audio"])
    layer = run.model.standardization["audio"]
    torch.testing.assert_close(layer.mean, torch.from_numpy(mean).float())
    torch.testing.assert_close(layer.scale, torch.from_numpy(1 / deviation).float())
    plain = train(data, tmp_path / "plain", device="cpu", show=False, epochs=1, standardize=False, **sizes)
    assert len(plain.model.standardization) == 0

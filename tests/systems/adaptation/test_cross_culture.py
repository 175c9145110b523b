"""Adversarial cross-culture training: its losses, whose gradient is reversed, and what it does to a representation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_adaptation import CLASSES, MODALITIES, batch_of, cross_culture, ragged_batch, small_data
from torch import Tensor

from mmer_fast.data import DataError
from mmer_fast.systems.adaptation import CrossCulture, CrossCultureConfig, culture_loss


def cross_entropy(scores: list[float], index: int) -> float:
    return math.log(sum(math.exp(s) for s in scores)) - scores[index]


def test_losses_are_cross_entropies() -> None:
    model, batch = cross_culture(culture_weight=0.7), ragged_batch()
    cultures = batch.extras["culture"]
    cultures[3] = -1  # unknown: its emotion counts
    fused = model.fused(batch)
    emotion = model.logits(batch).tolist()
    culture = model.culture_classifier(fused).tolist()
    recognition = sum(cross_entropy(emotion[b], int(batch.labels[b].argmax())) for b in range(8)) / 8
    adversary = sum(cross_entropy(culture[b], int(cultures[b])) for b in range(8) if b != 3) / 7
    objective = model.objective(batch)
    assert objective.parts.tolist() == pytest.approx([recognition, adversary], rel=1e-12)
    assert objective.total.item() == pytest.approx(recognition + 0.7 * adversary, rel=1e-12)
    torch.testing.assert_close(objective.logits, model.logits(batch).detach())


def test_no_culture_is_known() -> None:
    logits = torch.randn(3, 2, requires_grad=True)
    loss = culture_loss(logits, torch.full((3,), -1))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_gradient_is_reversed_below_the_culture_classifier_only(scale: float) -> None:
    model, batch = cross_culture(reversal_scale=scale), ragged_batch()
    below = [*model.encoders.parameters(), *model.fusion.parameters()]
    above = list(model.culture_classifier.parameters())
    fused = model.fused(batch)
    plain = culture_loss(model.culture_classifier.layers(fused), batch.extras["culture"])
    plain_below = torch.autograd.grad(plain, below, retain_graph=True)
    plain_above = torch.autograd.grad(plain, above)
    loss = culture_loss(model.culture_classifier(model.fused(batch)), batch.extras["culture"])
    found_below = torch.autograd.grad(loss, below, retain_graph=True)
    found_above = torch.autograd.grad(loss, above)
    assert max(gradient.abs().max() for gradient in plain_below) > 1e-3
    for found, expected in zip(found_below, plain_below, strict=True):
        torch.testing.assert_close(found, -scale * expected)
    for found, expected in zip(found_above, plain_above, strict=True):
        torch.testing.assert_close(found, expected)


def test_labels_of_other_cultures_are_not_read() -> None:
    model, batch = cross_culture(labelled_cultures="1"), ragged_batch()
    other = batch.extras["culture"] == 0
    assert 0 < other.sum() < 8
    losses = [-model.logits(batch)[b].log_softmax(0)[batch.labels[b].argmax()].item() for b in range(8) if not other[b]]
    before = model.objective(batch).total
    batch.labels[other] = batch.labels[other].roll(1, dims=1)
    assert model.objective(batch).total == before
    assert model.objective(batch).parts[0].item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def trained(scale: float) -> tuple[float, float]:
    """Accuracy on the test split: of the classes, and of the cultures by a fresh linear probe of the representation."""
    data = small_data(n=240, signal=1.0)
    model = cross_culture(reversal_scale=scale)
    model.fit(data.splits["train"])
    train, test = (batch_of(data.splits[name], list(range(240))) for name in ("train", "test"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        model.objective(train).total.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model.logits(test).argmax(1) == test.labels.argmax(1)
        known, asked = model.fused(train), model.fused(test)
    return right.double().mean().item(), probe(known, train.extras["culture"], asked, test.extras["culture"])


def probe(known: Tensor, classes: Tensor, asked: Tensor, expected: Tensor) -> float:
    """Accuracy of linear least squares on the representation."""
    design = torch.cat([known, torch.ones_like(known[:, :1])], dim=1)
    weights = torch.linalg.lstsq(design, 2.0 * classes[:, None].double() - 1, driver="gelsd").solution
    scores = torch.cat([asked, torch.ones_like(asked[:, :1])], dim=1) @ weights
    return ((scores[:, 0] > 0) == expected).double().mean().item()


def test_the_adversary_hides_culture_and_leaves_emotion() -> None:
    (watched_emotion, watched_culture), (emotion, culture) = trained(0.0), trained(1.0)
    assert watched_culture > 0.68
    assert culture < watched_culture - 0.08
    assert emotion > watched_emotion - 0.1 > 0.6


def test_data_without_cultures_is_refused() -> None:
    data, config = small_data(), CrossCultureConfig(cultures=2)
    CrossCulture.check_data(data, config)
    extras = data.splits["train"].extras
    for wrong in (np.full(24, 2), np.full(24, -2), np.zeros(24), np.zeros((24, 1), dtype=np.int64)):
        extras["culture"] = wrong
        with pytest.raises(DataError, match=r"extras culture: expected \(N,\) integers below cultures=2"):
            CrossCulture.check_data(data, config)
    del extras["culture"]
    with pytest.raises(DataError, match="expected the extra culture"):
        CrossCulture.check_data(data, config)


def test_data_with_several_labels_is_refused_as_classes() -> None:
    data = small_data()
    data.splits["test"].labels[0] = 0
    with pytest.raises(DataError, match="test labels: expected exactly one"):
        CrossCulture.check_data(data, CrossCultureConfig(cultures=2))
    CrossCulture.check_data(data, CrossCultureConfig(cultures=2, outputs="labels"))


def test_labels_that_are_not_used_need_not_be_there() -> None:
    data = small_data()
    train = data.splits["train"]
    train.labels[train.extras["culture"] == 0] = 0
    CrossCulture.check_data(data, CrossCultureConfig(cultures=2, labelled_cultures="1"))
    first = int(np.flatnonzero(train.extras["culture"] == 0)[0])
    for labelled in (None, "0", "0+1"):
        with pytest.raises(DataError, match=f"train labels: expected exactly one .* for sample {first} "):
            CrossCulture.check_data(data, CrossCultureConfig(cultures=2, labelled_cultures=labelled))
    with pytest.raises(DataError, match=r"expected a sample of labelled_cultures='2'; got 0, 1"):
        CrossCulture.check_data(data, CrossCultureConfig(cultures=3, labelled_cultures="2"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"cultures": 1}, "cultures must be at least 2, got 1"),
        ({"labelled_cultures": "0+3"}, r"labelled_cultures must be numbers from 0 to 2, joined by '\+', or None"),
        ({"labelled_cultures": "first"}, "labelled_cultures must be numbers"),
        ({"culture_weight": -1.0}, "culture_weight must be at least 0"),
        ({"reversal_scale": -1.0}, "reversal_scale must be at least 0"),
        ({"fused_dim": 0}, "fused_dim must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"CrossCultureConfig.{complaint}"):
        CrossCultureConfig(**changes)


def test_padding_and_missing_modalities_are_not_read() -> None:
    model, batch = cross_culture(), ragged_batch()
    clean = model.objective(batch).total
    for name, x_btf in batch.features.items():
        padding = torch.arange(x_btf.shape[1]) >= batch.lengths[name][:, None]
        batch.features[name] = x_btf.masked_fill(padding[..., None], math.nan)
    objective = model.objective(batch)
    objective.total.backward()
    torch.testing.assert_close(objective.total, clean, rtol=0, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.logits(batch).shape == (8, CLASSES)
    assert list(model.encoders) == list(MODALITIES)

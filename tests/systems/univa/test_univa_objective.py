"""UniVA's losses together: their weights, scales of the scores, ablations; and the recognition loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_univa import NAMES, batch_of, built, small_data
from torch import nn

from mmer_fast.data import Batch, MultiModalData
from mmer_fast.systems.univa import (
    UniVAConfig,
    UniVAObjective,
    column_norm_prior,
    emotion_similarity,
    emotion_va,
    softmax_label_kl,
    squared_difference_prior,
    va_contrastive_loss,
)


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return small_data()


def double(batch: Batch) -> Batch:
    features = {name: x.double() for name, x in batch.features.items()}
    return replace(batch, features=features, labels=batch.labels.double())


def test_label_kl() -> None:
    logits = torch.tensor([[0.3, -2.0, 4.0], [1.5, 0.0, -6.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    total = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        for k in range(3):
            target = math.exp(y[k]) / sum(map(math.exp, y))
            total += target * (math.log(target) - math.log(math.exp(z[k]) / sum(map(math.exp, z))))
    assert softmax_label_kl(logits, labels).item() == pytest.approx(total / 6, rel=1e-12)


@pytest.mark.parametrize("present", range(7))
def test_threshold_of_the_label_softmax(present: int) -> None:
    """At .18 of a softmax of six labels those that hold are predicted, unless all six do."""
    labels = (torch.arange(6) < present).float()
    predicted = labels.softmax(dim=0) > 0.18
    assert torch.equal(predicted, labels.bool() if present < 6 else torch.zeros(6, dtype=torch.bool))


@pytest.mark.parametrize("code", [False, True], ids=["slides", "published code"])
def test_total_is_the_weighted_sum_of_losses(data: MultiModalData, code: bool) -> None:
    published: dict[str, Any] = {
        "va_scaling": "valence",
        "normalize": False,
        "views": 2,
        "contrast_reduction": "mean",
        "prior": "column_norm",
        "trainable_similarity": True,
        "contrast_weights": {"text": 3.0},
    }
    model = built(data, **(published if code else {})).double()
    batch = double(batch_of(data))
    result = model.objective(batch)
    hidden = model.encode(batch.features, batch.lengths)
    logits = model.classify(hidden)
    contrast = torch.zeros((), dtype=torch.float64)
    for name in NAMES:
        there = batch.lengths[name] > 0
        va = batch.extras[f"va_{name}"][there].double()
        options: dict[str, Any] = {"temperature": 0.4}
        if code:
            train = data.splits["train"].extras[f"va_{name}"].astype(np.float64)
            va = (va - train[:, 0].mean()) / train[:, 0].std(ddof=1)
            options |= {"normalize": False, "views": 2, "reduction": "mean"}
        loss = va_contrastive_loss(hidden[name][there], va.float(), **options)
        contrast = contrast + loss * (3 if code and name == "text" else 1) / 3
    similarity = emotion_similarity(emotion_va(data.label_names)).float().double()
    prior = (
        column_norm_prior(logits.log_softmax(dim=1), similarity)
        if code
        else squared_difference_prior(logits.softmax(dim=1), similarity)
    )
    kl = softmax_label_kl(logits, batch.labels)
    total = 0.8 * (1000 * kl + prior) + 0.2 * contrast
    torch.testing.assert_close(result.total, total, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.parts, torch.stack([kl, contrast, prior]).detach().float(), rtol=1e-5, atol=1e-6)
    assert result.parts.shape == (len(model.loss_names),)
    assert torch.equal(result.logits, logits)
    assert not result.logits.requires_grad
    assert isinstance(model.losses.similarity, nn.Parameter) == code


def test_scales_of_scores(data: MultiModalData) -> None:
    """Fitted to the samples that have the modality; of all modalities only text is missing somewhere."""
    test = data.splits["test"]
    model = built(data, va_scaling="standard")
    model.fit(test)
    for name in NAMES:
        there = torch.from_numpy(test.lengths[name] > 0)
        scaled = model.losses.va_scaling[name](torch.from_numpy(test.extras[f"va_{name}"]))[there]
        torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(scaled.std(dim=0), torch.ones(2))


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"contrast": False}, {"contrast"}),
        ({"prior": "none"}, {"prior"}),
        ({"contrast": False, "prior": "none"}, {"contrast", "prior"}),
    ],
    ids=["w/o VA-CL", "w/o VA-ECP", "w/o both"],
)
def test_ablations(data: MultiModalData, changes: dict[str, Any], left_out: set[str]) -> None:
    model = built(data, **changes)
    batch = batch_of(data)
    if "contrast" in left_out:
        batch.extras.clear()
    result = model.objective(batch)
    parts = dict(zip(model.loss_names, result.parts.tolist(), strict=True))
    assert {name for name, value in parts.items() if value == 0} == left_out
    weight = 1.0 if "contrast" in left_out else 0.8
    expected = weight * (1000 * parts["recognition"] + parts["prior"]) + 0.2 * parts["contrast"]
    assert result.total.item() == pytest.approx(expected, rel=1e-5)


def test_losses_over_any_network(data: MultiModalData) -> None:
    """`UniVAObjective` takes representations of any width and origin."""
    generator = torch.Generator().manual_seed(0)
    hidden = {"a": torch.randn(5, 3, generator=generator), "b": torch.randn(5, 7, generator=generator)}
    va = {name: torch.rand(5, 2, generator=generator) for name in hidden}
    lengths = {name: torch.ones(5, dtype=torch.int64) for name in hidden}
    logits = torch.randn(5, 6, generator=generator, requires_grad=True)
    objective = UniVAObjective(["a", "b"], 6, UniVAConfig())
    objective(logits, torch.ones(5, 6), hidden, va, lengths).total.backward()
    assert logits.grad is not None

"""MMIN's objective against the talk's equations written out sample by sample, and what each phase and switch does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_mmin import CLASSES, MODALITIES, ragged_batch, small_config, small_data, small_mmin
from torch import Tensor

from mmer_fast.data import Batch, DataError
from mmer_fast.models.outputs import CLASSES as CLASS_OUTPUTS
from mmer_fast.models.outputs import LABELS
from mmer_fast.systems.mmin import ABLATIONS, MMIN, missing_conditions

NAMES = list(MODALITIES)
CONDITIONS = missing_conditions(NAMES)


def pretrained(**changes: Any) -> MMIN:
    """In the second phase, its encoders no longer those of the teacher."""
    model = small_mmin(**changes)
    model.start_epoch(1)
    with torch.no_grad():
        for parameter in model.encoders.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def embedding(model: MMIN, encoders: torch.nn.ModuleDict, batch: Batch, b: int, available: tuple[str, ...]) -> Tensor:
    """concat(h^a, h^v, h^t) of one sample, its modalities encoded one by one; what is missing as configured."""
    parts = []
    for name, size in MODALITIES.items():
        length = int(batch.lengths[name][b])
        if name in available and length > 0:
            x_tf = batch.features[name][b, :length]
        elif model.config.missing == "features":
            x_tf = torch.zeros(1, size, dtype=torch.float64)
        else:
            parts.append(torch.zeros(model.config.dim, dtype=torch.float64))
            continue
        parts.append(encoders[name](x_tf[None], torch.tensor([len(x_tf)]))[0])
    return torch.cat(parts)


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    scores = logits.tolist()
    return math.log(sum(math.exp(s) for s in scores)) - scores[labels.tolist().index(1)]


@pytest.mark.parametrize("missing", ["embedding", "features"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("imagination", ["cascade", "autoencoder"])
def test_joint_loss_is_the_talks(missing: str, reduction: str, imagination: str) -> None:
    model, batch = pretrained(missing=missing, reduction=reduction, imagination=imagination), ragged_batch()
    assert model.teacher is not None
    assert model.imagination is not None
    assert model.joint_classifier is not None
    recognition = forward = backward = 0.0
    for b in range(len(batch)):
        for available in CONDITIONS:
            h = embedding(model, model.encoders, batch, b, available)
            others = tuple(name for name in NAMES if name not in available)
            target = embedding(model, model.teacher, batch, b, others)
            imagined, codes = model.imagination.forward_network(h[None])
            again, _ = model.imagination.backward_network(imagined)
            divisor = len(h) if reduction == "mean" else 1
            recognition += cross_entropy(model.joint_classifier(codes)[0], batch.labels[b])
            forward += ((target - imagined[0]) ** 2).sum().item() / divisor
            backward += ((h - again[0]) ** 2).sum().item() / divisor
    expected = torch.tensor([recognition, forward, backward], dtype=torch.float64) / (len(batch) * 6)
    objective = model.objective(batch)
    torch.testing.assert_close(objective.parts, expected, rtol=1e-10, atol=1e-12)
    total = expected[0] + 0.1 * expected[1] + 0.1 * expected[2]
    torch.testing.assert_close(objective.total, total, rtol=1e-10, atol=1e-12)
    options = {"missing": missing, "reduction": reduction, "imagination": imagination}
    weighted = pretrained(forward_weight=0.3, backward_weight=0.7, **options).objective(batch)
    total = expected[0] + 0.3 * expected[1] + 0.7 * expected[2]
    torch.testing.assert_close(weighted.total, total, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("missing", ["embedding", "features"])
def test_pretraining_is_cross_entropy_of_everything_there(missing: str) -> None:
    model, batch = small_mmin(missing=missing), ragged_batch()
    rows = torch.stack([embedding(model, model.encoders, batch, b, tuple(NAMES)) for b in range(len(batch))])
    logits = model.classifier(rows)
    expected = sum(cross_entropy(row, labels) for row, labels in zip(logits, batch.labels, strict=True)) / len(batch)
    objective = model.objective(batch)
    assert objective.total.item() == pytest.approx(expected, rel=1e-12)
    assert objective.parts.tolist() == [objective.total.item(), 0.0, 0.0]
    torch.testing.assert_close(objective.logits, logits.detach())
    torch.testing.assert_close(model.logits(batch), logits)


def test_augmented_baseline_learns_under_all_seven_conditions() -> None:
    model, batch = small_mmin(**ABLATIONS["augmented baseline"]), ragged_batch()
    expected = 0.0
    for b in range(len(batch)):
        for available in [*CONDITIONS, tuple(NAMES)]:
            row = model.classifier(embedding(model, model.encoders, batch, b, available)[None])[0]
            expected += cross_entropy(row, batch.labels[b]) / (7 * len(batch))
    assert model.objective(batch).total.item() == pytest.approx(expected, rel=1e-12)


def test_labels_are_learnt_one_by_one() -> None:
    model, batch = small_mmin(outputs="labels"), ragged_batch()
    batch.labels[0] = 1
    batch.labels[1] = 0
    total = 0.0
    for row, labels in zip(model.logits(batch).tolist(), batch.labels.tolist(), strict=True):
        total += sum(math.log(1 + math.exp(-x if y else x)) for x, y in zip(row, labels, strict=True))
    assert model.objective(batch).total.item() == pytest.approx(total / batch.labels.numel(), rel=1e-12)
    assert (model.outputs, small_mmin().outputs) == (LABELS, CLASS_OUTPUTS)


def test_the_teacher_is_copied_once_and_saved() -> None:
    model = small_mmin(pretrain_epochs=2)
    assert model.teacher is not None

    def differs() -> bool:
        pairs = zip(model.teacher.parameters(), model.encoders.parameters(), strict=True)
        return any(not torch.equal(taught, own) for taught, own in pairs)

    with torch.no_grad():
        next(model.encoders.parameters()).add_(1)
    model.start_epoch(1)
    assert differs()
    assert not model.imagines
    model.start_epoch(2)
    assert not differs()
    assert model.imagines
    with torch.no_grad():
        next(model.encoders.parameters()).add_(1)
    resumed = small_mmin(pretrain_epochs=2)
    resumed.load_state_dict(model.state_dict())
    resumed.start_epoch(2)
    batch = ragged_batch()
    torch.testing.assert_close(resumed.objective(batch).parts, model.objective(batch).parts, rtol=0, atol=0)


def test_the_teacher_stays_as_it_is() -> None:
    model, batch = pretrained(text_dropout=0.5, expansion="all", dropout=0.0), ragged_batch()
    model.train()
    assert model.teacher is not None
    assert not any(module.training for module in model.teacher.modules())
    model.objective(batch).total.backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    learning = [*model.encoders.parameters(), *model.imagination.parameters(), *model.joint_classifier.parameters()]
    assert all(parameter.grad is not None for parameter in learning)


def test_detached_target_has_no_gradient() -> None:
    batch = ragged_batch()
    followed, detached = (pretrained(detach_available=detach, backward_weight=1.0) for detach in (False, True))
    objectives = [model.objective(batch) for model in (followed, detached)]
    torch.testing.assert_close(objectives[0].total, objectives[1].total)
    for objective in objectives:
        objective.total.backward()
    pairs = zip(followed.encoders.parameters(), detached.encoders.parameters(), strict=True)
    assert max((p.grad - q.grad).abs().max() for p, q in pairs) > 1e-6
    for p, q in zip(followed.imagination.parameters(), detached.imagination.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_drawn_conditions_are_all_of_them_on_average() -> None:
    batch = ragged_batch()
    every = pretrained(expansion="all").objective(batch).parts
    model = pretrained(expansion="drawn")
    torch.manual_seed(1)
    drawn = torch.stack([model.objective(batch).parts for _ in range(200)])
    assert drawn.std(dim=0).min() > 0
    torch.testing.assert_close(drawn.mean(dim=0), every, rtol=0.05, atol=0)


@pytest.mark.parametrize("missing", ["embedding", "features"])
@pytest.mark.parametrize("phase", [0, 1])
def test_what_is_missing_is_not_read(missing: str, phase: int) -> None:
    model, batch = small_mmin(missing=missing).eval(), ragged_batch()
    model.start_epoch(phase)
    clean = model.logits(batch)
    for name, x_btf in batch.features.items():
        padding = torch.arange(x_btf.shape[1]) >= batch.lengths[name][:, None]
        batch.features[name] = x_btf.masked_fill(padding[..., None], math.nan)
    torch.testing.assert_close(model.logits(batch), clean, rtol=0, atol=0)
    model.objective(batch).total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_sample_without_anything_and_a_batch_of_one() -> None:
    model, batch = pretrained(), ragged_batch()
    one = batch.split([1, 5])[0]
    for name in NAMES:
        one.lengths[name] = torch.zeros(1, dtype=torch.int64)
    objective = model.objective(one)
    assert objective.total.isfinite()
    assert objective.logits.shape == (1, CLASSES)


def test_standardization_is_fitted_on_training_data() -> None:
    data, batch = small_data(), ragged_batch()
    model = small_mmin()
    model.fit(data.splits["train"])
    units = data.splits["train"].features["audio"][np.arange(7) < data.splits["train"].lengths["audio"][:, None]]
    expected = (batch.features["audio"].numpy() - units.mean(axis=0)) / units.std(axis=0)
    torch.testing.assert_close(model.standardized(batch, "audio"), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    unchanged = small_mmin(standardize=False)
    unchanged.fit(data.splits["train"])
    assert unchanged.standardized(batch, "audio") is batch.features["audio"]


@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=list(ABLATIONS))
def test_every_ablation_trains(changes: dict[str, Any]) -> None:
    model, batch = small_mmin(**changes), ragged_batch()
    model.start_epoch(1)
    model.objective(batch).total.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    assert any(name.startswith("encoders.") for name in learning)
    imagines = changes.get("imagination") != "none"
    assert any(name.startswith("imagination.forward") for name in learning) == imagines
    assert any(name.startswith("imagination.backward") for name in learning) == (imagines and "cycle" not in changes)


def test_two_and_four_modalities() -> None:
    batch = ragged_batch()
    for names, conditions in ((["text", "audio"], 2), (["text", "video", "audio", "more"], 14)):
        batch.features["more"], batch.lengths["more"] = batch.features["audio"], batch.lengths["audio"]
        sizes = {name: batch.features[name].shape[2] for name in names}
        model = MMIN(sizes, CLASSES, small_config(pretrain_epochs=0)).double()
        model.start_epoch(0)
        assert len(model.conditions) == conditions
        assert model.objective(batch).total.isfinite()


def test_data_with_several_labels_a_sample_is_refused_as_classes() -> None:
    data = small_data()
    MMIN.check_data(data, small_config())
    data.splits["valid"].labels[3] = [1, 1, 0]
    with pytest.raises(DataError, match=r"valid labels: expected exactly one .* got 2 for sample 3"):
        MMIN.check_data(data, small_config())
    MMIN.check_data(data, small_config(outputs="labels"))


def test_one_modality_cannot_be_missing() -> None:
    with pytest.raises(ValueError, match=r"modalities must be at least two .* got audio"):
        MMIN({"audio": 4}, CLASSES, small_config())
    MMIN({"audio": 4}, CLASSES, small_config(**ABLATIONS["full-modality baseline"]))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"conditions": "full"}, "conditions must be 'missing' with imagination, got 'full'"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"text_dropout": -0.1}, r"text_dropout must be in \[0, 1\), got -0.1"),
        ({"backward_weight": -1.0}, "backward_weight must be at least 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"pooling": "mean"}, "pooling must be"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"MMINConfig.{complaint}"):
        small_config(**changes)


def test_text_cnn_must_name_modalities() -> None:
    assert small_config().text_modalities({"words": 3, "text": 4}) == ["text"]
    assert small_config().text_modalities({"words": 3}) == []
    assert small_config(text_cnn="").text_modalities(MODALITIES) == []
    assert small_config(text_cnn="text+audio").text_modalities(MODALITIES) == ["text", "audio"]
    with pytest.raises(ValueError, match=r"text_cnn must be some of text, video, audio, joined by .* got 'words'"):
        MMIN(MODALITIES, CLASSES, small_config(text_cnn="words"))

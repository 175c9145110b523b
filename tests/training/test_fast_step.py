"""The fast step: gradients, losses and weights of the textbook step, from fewer passes."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from small_training import TRAIN, small_data
from step_twins import DROPOUT, NO_DROPOUT, assert_same, compare, make_batch, make_model, run, shrunk
from torch import Tensor
from torch.func import functional_call

import mmer_fast as mf
from mmer_fast.data import Batch, SequenceDataset
from mmer_fast.models import RobMMR
from mmer_fast.models.robmmr import Encodings
from mmer_fast.training import (
    PRESETS,
    Algorithm1,
    StepResult,
    TrainConfig,
)
from mmer_fast.training.fast_step import FastStep

NAMES = ("audio", "video")


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_have_the_gradients_of_the_textbook(name: str, measure: bool) -> None:
    changes, config = shrunk(name)
    compare(make_model(**{**changes, **NO_DROPOUT}), config, make_batch(), measure=measure)


@pytest.mark.parametrize(
    ("reversal", "masked_input", "app_gradient"),
    list(itertools.product(("mask_network", "scores"), ("features", "embedding"), ("recognition", "total"))),
)
@pytest.mark.parametrize("measure", [False, True])
def test_the_choices_of_the_model_and_of_g(reversal: str, masked_input: str, app_gradient: str, measure: bool) -> None:
    model = make_model(reversal=reversal, masked_input=masked_input)
    config = dataclasses.replace(TRAIN, gamma=0.5, app_gradient=app_gradient)
    compare(model, config, make_batch(), measure=measure)


@pytest.mark.parametrize("reversal", ["mask_network", "scores"])
@pytest.mark.parametrize(
    "changes",
    [
        {"perturbation": "random"},
        {"perturbation": "random", "rho": 0.0},
        {"perturbation": "fgsm"},
        {"perturbation": "pgd", "rho": 0.0},
        {"rho": 0.0},
        {"sigma": 0.0},
        {"rho": 0.0, "sigma": 0.0},
        {"perturbation": "fgsm", "sigma": 0.0},
        {"perturbation_norm": "tensor", "perturbed": "all"},
        {"perturbed": "attention"},
        {"perturbed": "feed_forward", "sigma": 0.25, "rho": 0.7},
        {"recognition_loss": "asymmetric", "consistency_loss": "softmax"},
    ],
    ids=str,
)
def test_the_choices_of_the_step(changes: dict[str, Any], reversal: str) -> None:
    config = dataclasses.replace(TRAIN, **{"gamma": 0.5, **changes})
    compare(make_model(reversal=reversal), config, make_batch(), measure=True)


@pytest.mark.parametrize("app_gradient", ["recognition", "total"])
def test_a_batch_without_one_modality(app_gradient: str) -> None:
    batch = make_batch()
    batch.lengths["audio"].zero_()
    compare(make_model(reversal="scores"), dataclasses.replace(TRAIN, app_gradient=app_gradient), batch, measure=True)


@pytest.mark.parametrize("frozen", ["unimodal", "all but the decoder's", "E^m"])
def test_frozen_parts(frozen: str) -> None:
    model = make_model(reversal="scores")
    config = dataclasses.replace(TRAIN, sigma=0.0 if frozen != "unimodal" else 1.0)
    parts = {"unimodal": ("embeddings", "unimodal_encoders"), "E^m": ("multimodal_encoder",)}
    default = ("embeddings", "unimodal_encoders", "multimodal_encoder", "mask_networks")
    for part in parts.get(frozen, default):
        model.get_submodule(part).requires_grad_(False)
    compare(model, config, make_batch())


def test_gradients_are_added_to_zeros() -> None:
    model, batch = make_model(), make_batch()
    _, expected = run(FastStep(model, TRAIN), batch)
    model.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    FastStep(model, TRAIN).accumulate_gradients(batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=0)


# Dropout.


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"app_gradient": "total"}, {"perturbation": "random"}, {"sigma": 0.0}, {"rho": 0.0}], ids=str
)
@pytest.mark.parametrize("reversal", ["mask_network", "scores"])
def test_dropout_that_is_not_shared_draws_the_numbers_of_the_textbook(
    reversal: str, changes: dict[str, Any], measure: bool
) -> None:
    config = dataclasses.replace(TRAIN, **{"gamma": 0.5, **changes})
    model = make_model(reversal=reversal, classifier_dropout=0.1, **DROPOUT)
    compare(model, config, make_batch(), measure=measure)


def one_graph(model: RobMMR, batch: Batch, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of Eq. 15 on one graph, in which the clean H^x is used three times."""
    parameters = dict(model.named_parameters())
    step, read = Algorithm1(model, config), _Read(model)
    clean = model.encode(batch.features, batch.lengths)
    logits = read(clean)
    masked = model.encode(batch.features, batch.lengths, model.temporal_masks(clean))
    l_r, l_m = (step.recognition_loss(x, batch.labels) for x in (logits, read(masked)))
    source = l_r + config.rho * l_m if config.app_gradient == "total" else l_r
    g = torch.autograd.grad(source, step.perturbed, retain_graph=True)
    whole = torch.cat([x.flatten() for x in g]).norm()
    moved = {id(p): p + config.gamma * x / whole for p, x in zip(step.perturbed, g, strict=True)}
    noisy = functional_call(read, {f"model.{name}": moved.get(id(p), p) for name, p in parameters.items()}, (clean,))
    l_p = step.consistency_loss(logits.detach(), noisy)
    gradients = torch.autograd.grad(l_r + config.rho * l_m + config.sigma * l_p, list(parameters.values()))
    return torch.stack([l_r, l_m, l_p]).detach(), dict(zip(parameters, gradients, strict=True))


class _Read(torch.nn.Module):
    def __init__(self, model: RobMMR) -> None:
        super().__init__()
        self.model = model

    def forward(self, encodings: Encodings) -> Tensor:
        return self.model.decode(*self.model.fuse(encodings))


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("app_gradient", ["recognition", "total"])
@pytest.mark.parametrize("reversal", ["mask_network", "scores"])
def test_shared_dropout_is_one_graph_with_the_same_draws(reversal: str, app_gradient: str, measure: bool) -> None:
    model, batch = make_model(reversal=reversal, classifier_dropout=0.1, **DROPOUT), make_batch()
    config = dataclasses.replace(TRAIN, gamma=0.5, app_gradient=app_gradient, share_dropout=True)
    torch.manual_seed(3)
    losses, gradients = one_graph(model, batch, config)
    result, got = run(FastStep(model, config), batch, measure=measure)
    expected = StepResult(losses, result.logits, result.gradient_ratio)
    assert_same((result, got), (expected, dict(gradients)))


def test_sharing_changes_the_consistency_loss_with_dropout_only() -> None:
    """It is free of the difference of two draws of E^x then, and without draws of E^m and D smaller."""
    batch = make_batch()
    for changes, same in ((DROPOUT, False), ({"dropout": 0.2}, False), ({"attention_dropout": 0.2}, False), ({}, True)):
        model = make_model(**changes)
        assert model.multimodal_encoder is not None
        assert model.decoder is not None
        model.multimodal_encoder.eval()
        model.decoder.eval()
        losses = [
            run(FastStep(model, dataclasses.replace(TRAIN, share_dropout=share)), batch)[0].losses
            for share in (False, True)
        ]
        assert torch.equal(losses[0][:2], losses[1][:2])
        assert torch.equal(losses[0][2], losses[1][2]) == same
        assert same or losses[1][2] < losses[0][2]


# Twenty steps of the optimiser.


def make_batches(dtype: torch.dtype) -> list[Batch]:
    """Four batches of 4 to 6 samples with nothing in common; in each, one sample lacks its audio."""
    data = SequenceDataset(small_data().splits["train"])
    batches = []
    for i in range(4):
        batch = data.__getitems__(range(7 * i, 7 * i + 4 + i % 3))
        batch.features = {name: x.to(dtype) for name, x in batch.features.items()}
        batch.labels = batch.labels.to(dtype)
        batch.lengths["audio"][i] = 0
        batches.append(batch)
    return batches


def train_twenty_steps(step: Algorithm1, batches: list[Batch]) -> Tensor:
    """Losses (20, 3) of steps that go round the batches; the i-th step draws its dropout from the seed i."""
    optimizer = torch.optim.AdamW(step.model.parameters(), lr=1e-3)
    losses = []
    for i in range(20):
        optimizer.zero_grad()
        torch.manual_seed(i)
        losses.append(step.accumulate_gradients(batches[i % len(batches)]).losses)
        optimizer.step()
    return torch.stack(losses)


@pytest.mark.parametrize("dropout", [NO_DROPOUT, {**DROPOUT, "classifier_dropout": 0.1}], ids=["none", "dropout"])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("paper", torch.float64, 1e-9),
        ("authors", torch.float64, 1e-9),
        ("paper", torch.float32, 1e-4),  # the other's L_p, of nearly equal logarithms, has four digits in float32
    ],
    ids=str,
)
def test_twenty_steps_over_several_batches_have_the_same_losses_and_weights(
    name: str, dtype: torch.dtype, tolerance: float, dropout: dict[str, float]
) -> None:
    changes, config = shrunk(name)
    changes |= {**dropout, "unimodal_blocks": 1}
    if name == "authors":
        changes |= {"padded_length": 12, "mask_count": 5}
    batches = make_batches(dtype)
    models = [make_model(dtype, **changes) for _ in range(2)]
    start = [p.detach().clone() for p in models[0].parameters()]
    textbook = train_twenty_steps(Algorithm1(models[0], config), batches)
    fast = train_twenty_steps(FastStep(models[1], config), batches)
    torch.testing.assert_close(fast, textbook, rtol=tolerance, atol=0)
    if dtype == torch.float32:
        return  # AdamW takes full steps along gradients that are rounding
    for (key, expected), got, before in zip(models[0].named_parameters(), models[1].parameters(), start, strict=True):
        if not key.endswith("key.bias"):  # without influence: its gradients are rounding in float64 too
            assert not torch.equal(expected, before), key
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")


# What is saved.


class Passes:
    """Forward and backward passes of each E^x, forward ones of E^m."""

    def __init__(self, model: RobMMR) -> None:
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        for name, encoder in [*model.unimodal_encoders.items(), ("E^m", model.multimodal_encoder)]:
            encoder.register_forward_hook(lambda *_, n=name: self.forward.update([n]))
            # the hook of a module would see one call a forward pass; that of its last LayerNorm's output, each backward
            encoder.norm.register_forward_hook(lambda _m, _i, out, n=name: self.watch(out, n))

    def watch(self, out: Tensor, name: str) -> None:
        assert out.grad_fn is not None
        out.grad_fn.register_hook(lambda *_: self.backward.update([name]))


def passes(kind: type[Algorithm1], model: RobMMR, config: TrainConfig, measure: bool = False) -> Passes:
    model.zero_grad()
    counted = Passes(model)
    kind(model, config).accumulate_gradients(make_batch(), measure_ratio=measure)
    return counted


@pytest.mark.parametrize(
    ("reversal", "app_gradient", "model", "share", "textbook", "fast"),
    [
        ("mask_network", "recognition", {}, False, (3, 3), (2, 2)),
        ("scores", "recognition", {}, False, (3, 4), (2, 2)),
        ("scores", "total", {}, False, (3, 4), (2, 2)),
        ("scores", "total", DROPOUT, False, (3, 4), (3, 3)),
        ("scores", "total", DROPOUT, True, (3, 4), (2, 2)),
        ("mask_network", "recognition", DROPOUT, True, (3, 3), (2, 2)),
    ],
)
def test_fewer_passes_of_the_unimodal_encoders(
    reversal: str,
    app_gradient: str,
    model: dict[str, float],
    share: bool,
    textbook: tuple[int, int],
    fast: tuple[int, int],
) -> None:
    config = dataclasses.replace(TRAIN, app_gradient=app_gradient, share_dropout=share)
    for kind, expected in ((Algorithm1, textbook), (FastStep, fast)):
        counted = passes(kind, make_model(reversal=reversal, **model), config)
        assert [(counted.forward[n], counted.backward[n]) for n in NAMES] == [expected] * 2
        assert counted.forward["E^m"] == counted.backward["E^m"] == 3


def test_measuring_the_ratio_costs_one_backward_pass() -> None:
    counted = passes(FastStep, make_model(), TRAIN, measure=True)
    assert (counted.forward["audio"], counted.backward["audio"]) == (2, 3)


def test_soft_topk_is_launched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    launched = mf.temporal_mask
    monkeypatch.setattr(mf, "temporal_mask", lambda x, *a, **k: calls.append(x.shape) or launched(x, *a, **k))
    for app_gradient in ("recognition", "total"):
        calls.clear()
        config = dataclasses.replace(TRAIN, app_gradient=app_gradient)
        FastStep(make_model(), config).accumulate_gradients(make_batch(), measure_ratio=True)
        assert [shape[0] for shape in calls] == [2 * 6]


def test_evaluation_mode_needs_no_draw_of_its_own() -> None:
    model = make_model(**DROPOUT).eval()
    assert passes(FastStep, model, TRAIN).forward["audio"] == 2
    compare(model, TRAIN, make_batch())


# Exceptions.


@pytest.mark.parametrize("place", ["masks", "noisy forward", "noisy backward"])
def test_an_exception_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    model, batch = make_model(), make_batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = FastStep(model, dataclasses.replace(TRAIN, gamma=0.5))
    _, expected = run(step, batch)

    def fail(*_: object) -> Any:
        inside.append(any(not torch.equal(p, before[n]) for n, p in model.named_parameters()))
        raise KeyboardInterrupt

    inside: list[bool] = []
    with monkeypatch.context() as patch:
        if place == "masks":
            patch.setattr(model, "temporal_masks", fail)
        elif place == "noisy forward":
            patch.setattr(step, "consistency_loss", fail)
        else:
            kept = step.consistency_loss
            patch.setattr(step, "consistency_loss", lambda p, q: kept(p, _FailsBackward.apply(q, fail)))
        with pytest.raises(KeyboardInterrupt):
            run(step, batch)
    assert inside == [place != "masks"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    _, again = run(step, batch)
    assert all(torch.equal(again[n], g) for n, g in expected.items() if g is not None)


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fail: Any) -> Tensor:
        ctx.fail = fail
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.fail()


# bfloat16.


@pytest.mark.parametrize("name", PRESETS)
def test_autocast_errs_no_more_than_the_textbook_under_it(name: str) -> None:
    changes, config = shrunk(name)
    batch = make_batch(12, torch.float32)
    model = make_model(torch.float32, **{**changes, **NO_DROPOUT})
    expected, wide = run(FastStep(model, config), batch)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(Algorithm1(model, config), batch)[1]
    got, narrow = run(FastStep(model, dataclasses.replace(config, precision="bfloat16")), batch, measure=True)
    assert got.losses.dtype == got.logits.dtype == torch.float32
    assert got.gradient_ratio is not None
    assert got.gradient_ratio.isfinite()
    torch.testing.assert_close(got.losses[:2], expected.losses[:2], rtol=0.03, atol=0)
    assert all(g is None or g.dtype == torch.float32 for g in narrow.values())
    exact, fast, textbook = (
        torch.cat([x.flatten() for x in g.values() if x is not None]) for g in (wide, narrow, plain)
    )
    assert 0 < (fast - exact).norm() < 2 * (textbook - exact).norm()


def test_masks_are_computed_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(torch.float32)
    dtypes = set()
    linear = model.mask_networks["audio"].linear
    linear.register_forward_hook(lambda _, inputs, out: dtypes.update([inputs[0].dtype, out.dtype]))
    FastStep(model, dataclasses.replace(TRAIN, precision="bfloat16")).accumulate_gradients(
        make_batch(dtype=torch.float32)
    )
    assert dtypes == {torch.float32}

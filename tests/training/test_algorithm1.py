"""Algorithm 1: the gradients it accumulates are those of the objective of Eq. 15."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_training import MODEL, TRAIN, small_data, small_model
from torch import Tensor
from torch.func import functional_call

from mmer_fast import bernoulli_kl_with_logits, softmax_kl_with_logits
from mmer_fast.data import Batch, SequenceDataset
from mmer_fast.models import RobMMR
from mmer_fast.models.losses import asymmetric_loss, binary_cross_entropy
from mmer_fast.training import Algorithm1, TrainConfig

PAPER = {"rho": 0.1, "sigma": 1.0, "gamma": 0.5}
AUTHORS = {
    **PAPER,
    "perturbation_norm": "tensor",
    "perturbed": "all",
    "app_gradient": "total",
    "recognition_loss": "asymmetric",
    "consistency_loss": "softmax",
}
CASES = [("mask_network", PAPER), ("scores", PAPER), ("mask_network", AUTHORS), ("scores", AUTHORS)]


def problem(reversal: str = "mask_network") -> tuple[RobMMR, Batch]:
    data = small_data()
    config = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0, reversal=reversal)
    batch = SequenceDataset(data.splits["train"]).__getitems__(range(6))
    batch.features = {name: x.double() for name, x in batch.features.items()}
    batch.labels = batch.labels.double()
    batch.lengths["audio"][2] = 0
    return small_model(data, config).double(), batch


def gradients_of_eq_15(model: RobMMR, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """∇(L_r + ρ L_m + σ L_p) by autograd on one graph, with ε and the target of L_p as constants."""
    recognition = {"bce": binary_cross_entropy, "asymmetric": asymmetric_loss}[config.recognition_loss]
    consistency = {"bernoulli": bernoulli_kl_with_logits, "softmax": softmax_kl_with_logits}[config.consistency_loss]
    parameters = dict(model.named_parameters())
    clean = model(batch.features, batch.lengths)
    l_r = recognition(clean.logits, batch.labels)
    masks = model.temporal_masks(clean.encodings)
    l_m = recognition(model(batch.features, batch.lengths, masks).logits, batch.labels)

    source = l_r if config.app_gradient == "recognition" else l_r + config.rho * l_m
    g = dict(
        zip(
            parameters,
            torch.autograd.grad(source, list(parameters.values()), retain_graph=True, allow_unused=True),
            strict=True,
        )
    )
    in_encoder = [name for name in parameters if name.startswith("multimodal_encoder.")]
    if config.perturbed == "projections":
        in_encoder = [name for name in in_encoder if name.endswith("weight") and "norm" not in name]
    whole = torch.cat([g[name].flatten() for name in in_encoder]).norm()
    perturbed = dict(parameters)
    for name in in_encoder:
        norm = whole if config.perturbation_norm == "global" else g[name].norm()
        perturbed[name] = parameters[name] + config.gamma * g[name] / norm
    noisy = functional_call(model, perturbed, (batch.features, batch.lengths))
    l_p = consistency(clean.logits.detach(), noisy.logits)

    total = l_r + config.rho * l_m + config.sigma * l_p
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


@pytest.mark.parametrize(("reversal", "changes"), CASES, ids=["paper", "paper-scores", "authors-mask", "authors"])
def test_accumulated_gradients_are_those_of_eq_15(reversal: str, changes: dict) -> None:
    model, batch = problem(reversal)
    config = dataclasses.replace(TRAIN, **changes)
    expected = gradients_of_eq_15(model, batch, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Algorithm1(model, config).accumulate_gradients(batch, measure_ratio=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_mask_networks_get_their_gradient_from_the_masked_loss_alone() -> None:
    model, batch = problem()
    Algorithm1(model, dataclasses.replace(TRAIN, rho=0.0)).accumulate_gradients(batch)
    assert all(p.grad is None for p in model.mask_networks.parameters())
    scaled = []
    for rho in (0.1, 0.2):
        model.zero_grad()
        Algorithm1(model, dataclasses.replace(TRAIN, rho=rho)).accumulate_gradients(batch)
        scaled.append([p.grad for p in model.mask_networks.parameters()])
    for once, twice in zip(*scaled, strict=True):
        torch.testing.assert_close(twice, 2 * once)


def test_losses_and_logits_are_reported() -> None:
    model, batch = problem()
    result = Algorithm1(model, dataclasses.replace(TRAIN, **PAPER)).accumulate_gradients(batch)
    clean = model(batch.features, batch.lengths)
    masks = model.temporal_masks(clean.encodings)
    masked = model(batch.features, batch.lengths, masks).logits
    torch.testing.assert_close(result.logits, clean.logits)
    torch.testing.assert_close(result.losses[0], binary_cross_entropy(clean.logits, batch.labels))
    torch.testing.assert_close(result.losses[1], binary_cross_entropy(masked, batch.labels))
    assert result.losses[2] > 0
    assert result.gradient_ratio is None
    assert not result.losses.requires_grad


def test_passes_with_zero_weight_are_left_out() -> None:
    model, batch = problem()
    result = Algorithm1(model, dataclasses.replace(TRAIN, rho=0.0, sigma=0.0)).accumulate_gradients(
        batch, measure_ratio=True
    )
    assert result.losses[1:].tolist() == [0.0, 0.0]
    assert result.gradient_ratio is None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    binary_cross_entropy(model(batch.features, batch.lengths).logits, batch.labels).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


@pytest.mark.parametrize("sigma", [1.0, 0.25])
def test_the_gradient_ratio_is_that_of_the_unweighted_consistency_loss(sigma: float) -> None:
    model, batch = problem()

    def gradients(config: TrainConfig) -> Tensor:
        model.zero_grad()
        Algorithm1(model, config).accumulate_gradients(batch)
        return torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
        )

    config = dataclasses.replace(TRAIN, **{**PAPER, "sigma": sigma})
    whole, rest = gradients(config), gradients(dataclasses.replace(config, sigma=0.0))
    model.zero_grad()
    result = Algorithm1(model, config).accumulate_gradients(batch, measure_ratio=True)
    assert result.gradient_ratio is not None
    torch.testing.assert_close(result.gradient_ratio, (whole - rest).norm() / sigma / rest.norm())


def test_the_published_consistency_loss_is_inert_and_the_papers_is_not() -> None:
    ratios = {}
    for name, changes in (("paper", PAPER), ("authors", AUTHORS)):
        model, batch = problem()
        result = Algorithm1(model, dataclasses.replace(TRAIN, **changes)).accumulate_gradients(
            batch, measure_ratio=True
        )
        assert result.gradient_ratio is not None
        ratios[name] = result.gradient_ratio.item()
    assert ratios["authors"] < 1e-3
    assert ratios["paper"] > 1e-2

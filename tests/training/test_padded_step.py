"""Both steps, on packed tokens, against Algorithm 1 in plain PyTorch on padded batches, in float64.

`EagerStep` shares no operator and no packing with them; the mask, the authors' losses and the padding that counts are
written out again here. Dropout is off: the draws differ.

Left out: biases of keys, whose gradients are 0 in exact arithmetic (each softmax is invariant to them) and rounding in
any other; that they are no more than that is checked.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.data import Batch
from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.training import Algorithm1, TrainConfig, preset
from mmer_fast.training.fast_step import FastStep
from mmer_fast.training.perturbation import app_parameters

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # benchmarks/ is no part of the wheel

from benchmarks.training_step.eager import EagerStep, bernoulli_kl

TOLERANCE = 1e-9
FEATURES = {"text": 5, "audio": 3, "video": 4}
LABELS = 4
LENGTHS = {  # one sample lacks its audio, one its text and video, the last one everything
    "text": [9, 1, 6, 0, 3, 7, 0],
    "audio": [4, 8, 0, 5, 2, 1, 0],
    "video": [3, 2, 7, 0, 10, 9, 0],
}
SMALL: dict[str, Any] = {
    **{"dim": 16, "ffn_dim": 24, "heads": 2, "unimodal_blocks": 2, "multimodal_blocks": 2, "decoder_blocks": 1},
    **{"dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0},
}
AUTHORS = {"padded_length": 12, "mask_count": 5, "mask_iterations": 1000}  # after the preset's 100 some 1e-8 are left


def configs(name: str, changes: dict[str, Any]) -> tuple[RobMMRConfig, TrainConfig]:
    """Those of a preset in a small network, with changed fields of either."""
    model, train = preset(name)
    values = {"gamma": 0.5, **SMALL, **(AUTHORS if name == "authors" else {}), **changes}
    fields = {field.name for field in dataclasses.fields(RobMMRConfig)}
    return (
        dataclasses.replace(model, **{key: value for key, value in values.items() if key in fields}),
        dataclasses.replace(train, **{key: value for key, value in values.items() if key not in fields}),
    )


def make_model(config: RobMMRConfig) -> RobMMR:
    """Weights that are far from their start: no bias is 0, no LayerNorm is plain, scores are spread."""
    model = RobMMR(FEATURES, LABELS, config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for network in model.mask_networks.values():
            network.linear.weight.mul_(0.5)
    return model


def make_batch(lengths: dict[str, list[int]], padding: float) -> Batch:
    """Features of this seed, with padding of some value."""
    generator = torch.Generator().manual_seed(1)
    features, counts = {}, {name: torch.tensor(values) for name, values in lengths.items()}
    for name, size in FEATURES.items():
        shape = (len(counts[name]), max(1, *lengths[name]) + 1, size)
        x_btf = torch.randn(shape, generator=generator, dtype=torch.float64)
        valid_bt = torch.arange(shape[1]) < counts[name][:, None]
        features[name] = x_btf.masked_fill(~valid_bt[..., None], padding)
    samples = len(counts["text"])
    labels = (torch.rand(samples, LABELS, generator=generator) < 0.4).double()
    return Batch(features, counts, labels, torch.arange(samples))


def with_counted_padding(batch: Batch, steps: int) -> Batch:
    """The authors' samples are all of one length: units of zeros at the end are as good as any other."""
    features, lengths = {}, {}
    for name, x_btf in batch.features.items():
        x_btf = torch.cat([x_btf, x_btf.new_zeros(len(x_btf), steps - x_btf.shape[1], x_btf.shape[2])], 1)
        for sample, length in enumerate(batch.lengths[name].tolist()):
            x_btf[sample, length:] = 0.0
        features[name], lengths[name] = x_btf, torch.full_like(batch.lengths[name], steps)
    return dataclasses.replace(batch, features=features, lengths=lengths)


def exact_mask(config: RobMMRConfig, scores_bt: Tensor, lengths_b: Tensor) -> Tensor:
    """1 - T of Eq. 7-9, sum T = k: c by bisection, then a Newton step, which has the derivative of c in the scores."""
    valid_bt = torch.arange(scores_bt.shape[1]) < lengths_b[:, None]
    n_b1 = lengths_b[:, None].double()
    k_b1 = config.mask_ratio * n_b1 if config.mask_count is None else n_b1.clamp(max=config.mask_count)
    divisor: Any = config.mask_normalizer
    if divisor == "max":
        divisor = torch.maximum(scores_bt**2, (1 - scores_bt) ** 2)[valid_bt].max().detach()
    sign = 1 if config.mask_largest else -1
    t_bt = sign * 2 * (scores_bt - 0.5) / (config.mask_epsilon * divisor)
    with torch.no_grad():
        low = torch.full_like(t_bt[:, :1], -200.0)
        high = -low
        for _ in range(80):
            c = (low + high) / 2
            enough = ((t_bt + c).sigmoid() * valid_bt).sum(1, keepdim=True) >= k_b1
            low, high = torch.where(enough, low, c), torch.where(enough, c, high)
    taken_bt = (t_bt + c).sigmoid() * valid_bt
    slope_b1 = (taken_bt * (1 - taken_bt)).sum(1, keepdim=True).detach().clamp(min=1e-30)
    c = c - (taken_bt.sum(1, keepdim=True) - k_b1) / slope_b1
    return (-t_bt - c).sigmoid() * valid_bt


def published_asymmetric_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """γ− 2, γ+ 1, clip 0.05, eps 1e-5, 1000/(B·K), a case each for the labels that are there and that are not."""
    p = logits.sigmoid()
    q = (1.05 - p).clamp(max=1)
    here, absent = (1 - p) * p.clamp(min=1e-5).log(), (1 - q) ** 2 * q.clamp(min=1e-5).log()
    return -1000 / labels.numel() * torch.where(labels > 0, here, absent).sum()


def published_kl(clean: Tensor, noisy: Tensor) -> Tensor:
    """KL of softmaxes over the probabilities of the labels, mean of all."""
    return F.kl_div(noisy.sigmoid().log_softmax(-1), clean.sigmoid().softmax(-1), reduction="sum") / clean.numel()


def run(step: Any, model: RobMMR, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, and gradients by name; 0 of a parameter that has received none."""
    model.zero_grad()
    result = step.accumulate_gradients(batch)
    losses = result if isinstance(result, Tensor) else result.losses
    return losses, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def padded(model: RobMMR, config: TrainConfig, lengths: dict[str, list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """What plain PyTorch makes of the batch; its padding holds large numbers."""
    recognition = {"bce": F.binary_cross_entropy_with_logits, "asymmetric": published_asymmetric_loss}
    consistency = {"bernoulli": bernoulli_kl, "softmax": published_kl}
    step = EagerStep(
        model, config, exact_mask, recognition[config.recognition_loss], consistency[config.consistency_loss]
    )
    batch = make_batch(lengths, padding=30.0)
    if not model.config.padding_mask:
        assert model.config.padded_length is not None
        batch = with_counted_padding(batch, model.config.padded_length)
    return run(step, model, batch)


def assert_same(model: RobMMR, config: TrainConfig, lengths: dict[str, list[int]], kind: type[Algorithm1]) -> None:
    """Ours gets the batch with NaN for padding; each deviation is relative to the largest entry of its tensor."""
    expected_losses, expected = padded(model, config, lengths)
    losses, got = run(kind(model, config), model, make_batch(lengths, padding=torch.nan))
    assert expected_losses.min() > 1e-7  # each pass does something
    assert abs(expected_losses[1] / expected_losses[0] - 1) > 1e-3
    torch.testing.assert_close(losses, expected_losses, rtol=TOLERANCE, atol=0)
    whole = max(float(gradient.abs().max()) for gradient in expected.values())
    absent = {f"{n}." for n, values in lengths.items() if not any(values) and model.config.padding_mask}
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        if name.endswith("key.bias") or any(part in name for part in absent):
            assert largest < 1e-13 * whole, name
            assert float(got[name].abs().max()) < 1e-13 * whole, name
            continue
        deviation = float((got[name] - gradient).abs().max()) / largest
        assert deviation <= TOLERANCE, f"{name}: {deviation:.2g}"


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("paper", {}),
    ("paper", {"reversal": "scores", "app_gradient": "total"}),
    ("paper", {"reversal": "none", "masked_input": "embedding"}),
    ("authors", {}),
    ("authors", {"mask_solver": "newton", "mask_iterations": None}),
    ("authors", {"padding_mask": True, "padded_length": None, "mask_count": None}),
]


@pytest.mark.parametrize("kind", [Algorithm1, FastStep])
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_losses_and_all_gradients_are_those_of_plain_pytorch(
    name: str, changes: dict[str, Any], kind: type[Algorithm1]
) -> None:
    model_config, config = configs(name, changes)
    assert_same(make_model(model_config), config, LENGTHS, kind)


@pytest.mark.parametrize("kind", [Algorithm1, FastStep])
def test_a_batch_without_one_modality(kind: type[Algorithm1]) -> None:
    model_config, config = configs("paper", {"reversal": "scores"})
    assert_same(make_model(model_config), config, {**LENGTHS, "audio": [0] * len(LENGTHS["text"])}, kind)


def test_the_sinkhorn_of_the_benchmark_serves_samples_without_a_modality() -> None:
    model_config, config = configs("paper", {})
    model = make_model(model_config)
    exact = padded(model, config, LENGTHS)
    got = run(EagerStep(model, config), model, make_batch(LENGTHS, padding=30.0))
    torch.testing.assert_close(got[0], exact[0], rtol=1e-3, atol=0)
    flat = [torch.cat([gradient.flatten() for gradient in gradients.values()]) for _, gradients in (exact, got)]
    assert (flat[1] - flat[0]).norm() < 2e-2 * flat[0].norm()


@pytest.mark.parametrize("name", ["paper", "authors"])
def test_the_perturbed_weights_are_those_of_the_paper_and_of_the_published_code(name: str) -> None:
    """`EagerStep` asks the product for them: projections of attention and feed-forward of E^m, or all of E^m."""
    model_config, config = configs(name, {})
    model = make_model(model_config)
    everything = {key: p for key, p in model.named_parameters() if key.startswith("multimodal_encoder.")}
    matrices = {key for key, p in everything.items() if p.dim() == 2}
    assert len(matrices) == 2 * 6  # query, key, value, out, and two of the feed-forward, in each block
    expected = everything.keys() if name == "authors" else matrices
    assert {id(p) for p in app_parameters(model, config)} == {id(everything[key]) for key in expected}

"""What the third pass of Algorithm 1 perturbs: which weights, by Eq. 14, and back; FGSM and PGD by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from small_training import MODEL, TRAIN, small_data, small_model
from torch import Tensor, nn

from mmer_fast.data import Batch, SequenceDataset
from mmer_fast.models import RobMMR
from mmer_fast.training import Algorithm1
from mmer_fast.training.perturbation import fgsm_offsets, perturbed_parameters, pgd_offsets, random_directions


class Recorder:
    """The parameters of a model as they are in each forward pass, in order."""

    def __init__(self, model: RobMMR) -> None:
        self.model = model
        self.passes: list[dict[str, Tensor]] = []
        model.decoder.register_forward_pre_hook(lambda *_: self.passes.append(self.values()))

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def problem() -> tuple[RobMMR, Batch]:
    data = small_data()
    config = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0)
    return small_model(data, config), SequenceDataset(data.splits["train"]).__getitems__(range(6))


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_selection_of_parameters() -> None:
    encoder = small_model(small_data(), MODEL).multimodal_encoder
    names = {id(p): name for name, p in encoder.named_parameters()}
    chosen = {
        which: {names[id(p)] for p in perturbed_parameters(encoder, which)}
        for which in ("projections", "attention", "feed_forward", "all")
    }
    assert chosen["attention"] == {f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value", "out")}
    assert chosen["feed_forward"] == {"blocks.0.feed_forward.0.weight", "blocks.0.feed_forward.3.weight"}
    assert chosen["projections"] == chosen["attention"] | chosen["feed_forward"]
    assert chosen["all"] == set(names.values())


def test_frozen_and_tied_parameters_count_once_or_not_at_all() -> None:
    encoder = small_model(small_data(), MODEL).multimodal_encoder
    attention = encoder.blocks[0].attention
    attention.key.weight = attention.query.weight
    attention.value.weight.requires_grad_(False)
    chosen = perturbed_parameters(encoder, "attention")
    assert [id(p) for p in chosen] == [id(attention.query.weight), id(attention.out.weight)]


@pytest.mark.parametrize("perturbation", ["gradient", "random"])
@pytest.mark.parametrize(
    ("which", "kept"),
    [
        ("all", ()),
        ("projections", ("bias", "norm")),
        ("attention", ("bias", "norm", "feed_forward")),  # - FNN_ε of Table 2
        ("feed_forward", ("bias", "norm", "attention")),  # - Attention_ε
    ],
)
def test_the_perturbed_pass_has_other_weights_in_the_multimodal_encoder_only(
    perturbation: str, which: str, kept: tuple[str, ...]
) -> None:
    model, batch = problem()
    recorder = Recorder(model)
    Algorithm1(
        model, dataclasses.replace(TRAIN, perturbed=which, perturbation=perturbation, gamma=0.5)
    ).accumulate_gradients(batch)
    clean, masked, noisy = recorder.passes
    assert moved(clean, masked) == set()
    encoder = {name for name in clean if name.startswith("multimodal_encoder.")}
    dead = {"multimodal_encoder.blocks.0.attention.key.bias"}  # attention does not depend on it: g is 0 there
    assert moved(clean, noisy) - dead == {name for name in encoder if not any(part in name for part in kept)} - dead
    assert moved(clean, recorder.values()) == set()


@pytest.mark.parametrize("gamma", [0.5, 3.0])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_the_step_is_eq_14(gamma: float, scope: str, rho: float) -> None:
    model, batch = problem()
    model = model.double()
    batch = in_float64(batch)
    algorithm = Algorithm1(model, dataclasses.replace(TRAIN, rho=rho, gamma=gamma, perturbation_norm=scope))
    loss = algorithm.recognition_loss(model(batch.features, batch.lengths).logits, batch.labels)
    g = dict(zip(algorithm.perturbed, torch.autograd.grad(loss, algorithm.perturbed), strict=True))
    whole = torch.cat([x.flatten() for x in g.values()]).norm()
    recorder = Recorder(model)
    algorithm.accumulate_gradients(batch)
    for name, parameter in model.named_parameters():
        step = recorder.passes[-1][name] - recorder.passes[0][name]
        expected = torch.zeros_like(step)
        if parameter in g:
            expected = gamma * g[parameter] / (whole if scope == "global" else g[parameter].norm())
        torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-14)


def test_a_parameter_without_gradient_stays() -> None:
    model, batch = problem()
    unused = nn.Linear(3, 3)
    model.multimodal_encoder.blocks[0].feed_forward.add_module("unused", unused)
    model.multimodal_encoder.blocks[0].feed_forward.forward = _without_last(model)  # type: ignore[method-assign]
    for rho in (0.0, 0.1):
        recorder = Recorder(model)
        algorithm = Algorithm1(model, dataclasses.replace(TRAIN, rho=rho))
        assert any(p is unused.weight for p in algorithm.perturbed)
        model.zero_grad()
        algorithm.accumulate_gradients(batch)
        changed = moved(recorder.passes[0], recorder.passes[-1])
        assert changed
        assert not any("unused" in name for name in changed)


def _without_last(model: RobMMR) -> Callable[[Tensor], Tensor]:
    layers = list(model.multimodal_encoder.blocks[0].feed_forward)[:-1]

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return forward


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_weights_come_back_whatever_stops_the_perturbed_pass(
    monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    model, batch = problem()
    algorithm = Algorithm1(model, dataclasses.replace(TRAIN, gamma=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss, perturbed_seen = algorithm.consistency_loss, []

    def fail(*_: object) -> Tensor:
        perturbed_seen.append(moved(before, dict(model.named_parameters())))
        raise error

    def fail_backwards(target: Tensor, logits: Tensor) -> Tensor:
        value = loss(target, logits)
        value.register_hook(fail)
        return value

    if where == "forward":
        model.decoder.register_forward_pre_hook(
            lambda *_: fail() if moved(before, dict(model.named_parameters())) else None
        )
    else:
        monkeypatch.setattr(algorithm, "consistency_loss", fail if where == "loss" else fail_backwards)
    with pytest.raises(error):
        algorithm.accumulate_gradients(batch)
    assert len(perturbed_seen) == 1
    assert perturbed_seen[0]
    assert moved(before, dict(model.named_parameters())) == set()


@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_loss_that_is_not_finite_perturbs_nothing_and_the_step_goes_on(rho: float, scope: str) -> None:
    model, batch = problem()
    batch.labels = batch.labels.clone()
    batch.labels[1, 0] = math.nan
    recorder = Recorder(model)
    config = dataclasses.replace(TRAIN, gamma=0.5, rho=rho, perturbation_norm=scope)
    result = Algorithm1(model, config).accumulate_gradients(batch)
    assert moved(recorder.passes[0], recorder.passes[-1]) == set()
    assert result.losses[0].isnan()
    assert result.losses[2] == 0  # of two equal predictions
    assert moved(recorder.passes[0], recorder.values()) == set()


def test_random_directions_are_standard_normal_and_follow_the_seed() -> None:
    parameters = [nn.Parameter(torch.zeros(200, 300)), nn.Parameter(torch.zeros(50_000, dtype=torch.float64))]
    torch.manual_seed(5)
    first = random_directions(parameters)
    second = random_directions(parameters)
    torch.manual_seed(5)
    again = random_directions(parameters)
    for x, y, z, p in zip(first, second, again, parameters, strict=True):
        assert (x.shape, x.dtype, x.requires_grad) == (p.shape, p.dtype, False)
        assert torch.equal(x, z)
        # five standard deviations of mean, second and fourth moment, and of the correlation of independent draws
        n = x.numel()
        assert abs(x.mean()) < 5 / math.sqrt(n)
        assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / n)
        assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
        assert abs((x * y).mean()) < 5 / math.sqrt(n)


def test_fgsm_is_the_radius_times_the_sign() -> None:
    zeros = {"a": torch.zeros(2, 2, requires_grad=True), "b": torch.zeros(0, 2, requires_grad=True)}
    weights = torch.tensor([[3.0, -1e-20], [0.0, -5.0]])
    ((zeros["a"] * weights).sum() + zeros["b"].sum()).backward()
    offsets = fgsm_offsets(zeros, 0.25)
    assert offsets["a"].tolist() == [[0.25, -0.25], [0.0, -0.25]]
    assert offsets["b"].shape == (0, 2)
    assert not offsets["a"].requires_grad


def bowl(offsets: Mapping[str, Tensor]) -> Tensor:
    """Smooth, with a maximum inside of the ball for some entries and outside for others."""
    peaks = {"a": torch.tensor([[0.03, -2.0, 0.07]]), "b": torch.tensor([[5.0, -0.01, 0.0]])}
    return torch.stack([(-(x - peaks[name]).square() * 3).sum() for name, x in offsets.items()]).sum()


LIKE = {"a": torch.zeros(1, 3), "b": torch.zeros(1, 3)}


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_pgd_is_the_loop_written_out(steps: int) -> None:
    radius = 0.1
    torch.manual_seed(3)
    offsets = pgd_offsets(bowl, LIKE, radius, steps)
    torch.manual_seed(3)
    expected = {name: (torch.rand(1, 3) * 2 - 1) * radius for name in LIKE}
    for _ in range(steps):
        for name, x in expected.items():
            peak = {"a": torch.tensor([[0.03, -2.0, 0.07]]), "b": torch.tensor([[5.0, -0.01, 0.0]])}[name]
            direction = torch.where(x < peak, 1.0, -1.0)
            expected[name] = torch.minimum(
                torch.maximum(x + 2.5 * radius / steps * direction, -radius * torch.ones(1)), radius * torch.ones(1)
            )
    for name, x in offsets.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-7)
        assert not x.requires_grad


def test_pgd_stays_in_the_ball_starts_everywhere_and_climbs_at_least_as_high_as_fgsm() -> None:
    radius = 0.1
    zeros = {name: x.clone().requires_grad_() for name, x in LIKE.items()}
    bowl(zeros).backward()
    fast = bowl(fgsm_offsets(zeros, radius))
    starts: list[float] = []

    def watched(offsets: Mapping[str, Tensor]) -> Tensor:
        starts.append(offsets["a"][0, 0].item())
        assert all((x.abs() <= radius).all() for x in offsets.values())
        return bowl(offsets)

    for seed in range(200):
        torch.manual_seed(seed)
        starts_before = len(starts)
        found = pgd_offsets(watched, LIKE, radius, 40)
        assert len(starts) - starts_before == 40
        assert bowl(found) >= fast
        assert all((x.abs() <= radius).all() for x in found.values())
    first = torch.tensor(starts[::40]) / radius
    assert first.min() < -0.95
    assert first.max() > 0.95
    assert abs(first.mean()) < 5 / math.sqrt(3 * 200)


def in_float64(batch: Batch) -> Batch:
    batch.features = {name: x.double() for name, x in batch.features.items()}
    batch.labels = batch.labels.double()
    return batch

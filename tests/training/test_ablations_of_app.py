"""The rows of Table 2 that put something else in the place of APP: random perturbation, FGSM, PGD."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import MODEL, TRAIN, Silent, StopAt, run_config, small_data, small_model, train
from torch import Tensor
from torch.func import functional_call

from mmer_fast import cli
from mmer_fast.data import Batch, SequenceDataset, load, write_npz
from mmer_fast.models import RobMMR
from mmer_fast.models.losses import binary_cross_entropy
from mmer_fast.training import Algorithm1, StepResult, TrainConfig, configs_from_json, configs_to_json, preset
from mmer_fast.training.checkpoint import read_json, write_json
from mmer_fast.training.files import STATE_FILE
from mmer_fast.training.run import RunConfig, train_run

ABLATIONS = ("random", "fgsm", "pgd")
OF_EMBEDDINGS = ("fgsm", "pgd")
CPU = torch.device("cpu")


def problem(reversal: str = "mask_network") -> tuple[RobMMR, Batch]:
    """A model without dropout and a batch, in float64; one sample lacks its audio."""
    data = small_data()
    config = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0, reversal=reversal)
    batch = SequenceDataset(data.splits["train"]).__getitems__(range(6))
    batch.features = {name: x.double() for name, x in batch.features.items()}
    batch.labels = batch.labels.double()
    batch.lengths["audio"][2] = 0
    return small_model(data, config).double(), batch


def ablation(name: str, **changes: Any) -> TrainConfig:
    return dataclasses.replace(TRAIN, **{"perturbation": name, "gamma": 0.5, "embedding_radius": 0.05, **changes})


class Passes:
    """What each forward pass of a model reads: the tokens at the foot of each E^x, and the weights of E^m."""

    def __init__(self, model: RobMMR) -> None:
        self.tokens: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.current: dict[str, Tensor] = {}
        for name, encoder in model.unimodal_encoders.items():
            encoder.register_forward_pre_hook(lambda _, inputs, n=name: self.current.update({n: inputs[0].detach()}))
        model.multimodal_encoder.register_forward_pre_hook(self.finish)

    def finish(self, encoder: torch.nn.Module, _: object) -> None:
        self.tokens.append(self.current)
        self.weights.append({name: p.detach().clone() for name, p in encoder.named_parameters()})
        self.current = {}

    def moved(self, index: int) -> dict[str, Tensor]:
        """How far the tokens of a pass are from those of the first."""
        return {name: x - self.tokens[0][name] for name, x in self.tokens[index].items()}


def logits_at(model: RobMMR, batch: Batch, offsets: Mapping[str, Tensor]) -> Tensor:
    """Logits with offsets at the foot of each E^x, put there by hooks and not by the model."""
    hooks = [
        model.unimodal_encoders[name].register_forward_pre_hook(lambda _, inputs, o=x: (inputs[0] + o, *inputs[1:]))
        for name, x in offsets.items()
    ]
    try:
        return model(batch.features, batch.lengths).logits
    finally:
        for hook in hooks:
            hook.remove()


def loss_at(model: RobMMR, batch: Batch, offsets: Mapping[str, Tensor]) -> Tensor:
    return binary_cross_entropy(logits_at(model, batch, offsets), batch.labels)


def signs(model: RobMMR, batch: Batch, offsets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in offsets.items()}
    loss = loss_at(model, batch, leaves)
    return {n: g.sign() for n, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)}


def attack_by_hand(model: RobMMR, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    r, steps = config.embedding_radius, config.pgd_steps
    tokens = {name: int(batch.lengths[name].sum()) for name in model.modalities}
    zeros = {name: torch.zeros(n, model.config.dim, dtype=torch.float64) for name, n in tokens.items()}
    if config.perturbation == "fgsm":
        return {name: r * s for name, s in signs(model, batch, zeros).items()}
    offsets = {name: (2 * torch.rand_like(x) - 1) * r for name, x in zeros.items()}
    for _ in range(steps):
        step = signs(model, batch, offsets)
        offsets = {name: (x + 2.5 * r / steps * step[name]).clip(-r, r) for name, x in offsets.items()}
    return offsets


def test_random_perturbation_is_eq_14_with_normal_numbers_for_g() -> None:
    for scope in ("global", "tensor"):
        model, batch = problem()
        passes = Passes(model)
        algorithm = Algorithm1(model, ablation("random", perturbation_norm=scope))
        names = {id(p): name for name, p in model.multimodal_encoder.named_parameters()}
        torch.manual_seed(11)
        algorithm.accumulate_gradients(batch)
        torch.manual_seed(11)
        g = {names[id(p)]: torch.randn_like(p) for p in algorithm.perturbed}
        whole = torch.cat([x.flatten() for x in g.values()]).norm()
        for name, clean in passes.weights[0].items():
            step = passes.weights[-1][name] - clean
            norm = whole if scope == "global" else g[name].norm() if name in g else None
            expected = 0.5 * g[name] / norm if name in g else torch.zeros_like(step)
            torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-14)


def test_random_perturbation_has_the_norm_and_another_direction_every_step() -> None:
    model, batch = problem()
    passes = Passes(model)
    algorithm = Algorithm1(model, ablation("random"))

    def step() -> Tensor:
        model.zero_grad()
        algorithm.accumulate_gradients(batch)
        return torch.cat([(passes.weights[-1][n] - w).flatten() for n, w in passes.weights[0].items()])

    torch.manual_seed(1)
    steps = [step() for _ in range(4)]
    torch.manual_seed(1)
    assert torch.equal(step(), steps[0])
    for i, x in enumerate(steps):
        assert x.norm().item() == pytest.approx(0.5, rel=1e-12)
        for y in steps[:i]:
            # cosines of independent directions in n dimensions have standard deviation 1/sqrt(n)
            assert abs(x @ y).item() / 0.25 < 5 / math.sqrt(sum(p.numel() for p in algorithm.perturbed))


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_gradients_of_random_perturbation_are_those_of_eq_15(rho: float) -> None:
    model, batch = problem()
    passes = Passes(model)
    config = ablation("random", rho=rho, sigma=0.7)
    result = Algorithm1(model, config).accumulate_gradients(batch)
    parameters = dict(model.named_parameters())
    noisy = dict(parameters)
    for name, clean in passes.weights[0].items():
        # a constant step, so that the gradient arrives at the clean weights
        noisy[f"multimodal_encoder.{name}"] = parameters[f"multimodal_encoder.{name}"] + (
            passes.weights[-1][name] - clean
        )
    clean = model(batch.features, batch.lengths).logits
    p, q = clean.detach().sigmoid(), functional_call(model, noisy, (batch.features, batch.lengths)).logits
    l_p = (p * (p.log() - q.sigmoid().log()) + (1 - p) * ((1 - p).log() - (-q).sigmoid().log())).sum(1).mean()
    torch.testing.assert_close(result.losses[2], l_p.detach(), rtol=1e-9, atol=0)
    total = binary_cross_entropy(clean, batch.labels) + rho * masked_loss(model, batch) + config.sigma * l_p
    check_gradients(model, total)


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
@pytest.mark.parametrize(("rho", "reversal"), [(0.0, "mask_network"), (0.1, "mask_network"), (0.1, "scores")])
def test_gradients_of_adversarial_embeddings_are_those_of_the_two_or_three_losses(
    name: str, rho: float, reversal: str
) -> None:
    model, batch = problem(reversal)
    config = ablation(name, rho=rho, sigma=0.7)
    torch.manual_seed(2)
    offsets = attack_by_hand(model, batch, config)
    torch.manual_seed(2)
    result = Algorithm1(model, config).accumulate_gradients(batch)
    clean, moved = loss_at(model, batch, {}), loss_at(model, batch, offsets)
    torch.testing.assert_close(result.losses[0], clean.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.losses[2], moved.detach(), rtol=1e-9, atol=0)
    check_gradients(model, clean + rho * masked_loss(model, batch) + config.sigma * moved)


def masked_loss(model: RobMMR, batch: Batch) -> Tensor:
    masks = model.temporal_masks(model(batch.features, batch.lengths).encodings)
    return binary_cross_entropy(model(batch.features, batch.lengths, masks).logits, batch.labels)


def check_gradients(model: RobMMR, total: Tensor) -> None:
    parameters = dict(model.named_parameters())
    for (name, parameter), expected in zip(
        parameters.items(), torch.autograd.grad(total, list(parameters.values())), strict=True
    ):
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_embeddings_are_moved_by_the_hand_written_attack_and_the_loss_rises(name: str, rho: float) -> None:
    model, batch = problem()
    config = ablation(name, rho=rho)
    torch.manual_seed(4)
    expected = attack_by_hand(model, batch, config)
    torch.manual_seed(4)
    passes = Passes(model)
    result = Algorithm1(model, config).accumulate_gradients(batch)
    for modality, x in passes.moved(-1).items():
        torch.testing.assert_close(x, expected[modality], rtol=0, atol=1e-12)
    assert len(passes.tokens) == 2 + (rho > 0) + (config.pgd_steps if name == "pgd" else 0)
    assert result.losses[2] > result.losses[0]
    if name == "pgd":
        for index in range(len(passes.tokens) - 4, len(passes.tokens)):
            assert all((x.abs() <= 0.05 + 1e-12).all() for x in passes.moved(index).values())


def test_pgd_climbs_at_least_as_high_as_fgsm() -> None:
    losses = {}
    for name in OF_EMBEDDINGS:
        model, batch = problem()
        torch.manual_seed(0)
        config = ablation(name, embedding_radius=0.3, pgd_steps=10)
        losses[name] = Algorithm1(model, config).accumulate_gradients(batch).losses
    assert losses["pgd"][2] >= losses["fgsm"][2] > losses["fgsm"][0]


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_adversarial_embeddings_leave_the_weights_alone_in_every_pass(name: str) -> None:
    model, batch = problem()
    passes = Passes(model)
    before = {n: (p.detach().clone(), p._version) for n, p in model.named_parameters()}
    Algorithm1(model, ablation(name)).accumulate_gradients(batch, measure_ratio=True)
    assert all(torch.equal(w[n], passes.weights[0][n]) for w in passes.weights for n in w)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p._version == before[n][1]


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_padding_does_not_matter_to_the_attack(name: str) -> None:
    gradients = []
    for value, more in ((0.0, 0), (math.nan, 3)):
        model, batch = problem()
        for modality, x in batch.features.items():
            x = torch.nn.functional.pad(x, (0, 0, 0, more))
            padding = torch.arange(x.shape[1]) >= batch.lengths[modality][:, None]
            batch.features[modality] = x.masked_fill(padding[..., None], value)
        torch.manual_seed(0)
        Algorithm1(model, ablation(name, rho=0.0)).accumulate_gradients(batch)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_a_batch_without_one_modality_can_be_attacked(name: str) -> None:
    model, batch = problem()
    batch.lengths["audio"].zero_()
    result = Algorithm1(model, ablation(name)).accumulate_gradients(batch)
    assert result.losses[2] > result.losses[0]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("sigma", [1.0, 0.25])
def test_the_gradient_ratio_is_that_of_the_third_loss(name: str, sigma: float) -> None:
    model, batch = problem()

    def gradients(config: TrainConfig, measure: bool) -> tuple[Tensor, StepResult]:
        model.zero_grad()
        torch.manual_seed(0)
        result = Algorithm1(model, config).accumulate_gradients(batch, measure_ratio=measure)
        return torch.cat(
            [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()]
        ), result

    config = ablation(name, sigma=sigma)
    whole, result = gradients(config, True)
    rest, _ = gradients(dataclasses.replace(config, sigma=0.0), False)
    assert result.gradient_ratio is not None
    torch.testing.assert_close(result.gradient_ratio, (whole - rest).norm() / sigma / rest.norm())


@pytest.mark.parametrize("name", ABLATIONS)
def test_without_weight_there_is_no_third_pass(name: str) -> None:
    model, batch = problem()
    passes = Passes(model)
    state = torch.get_rng_state()
    result = Algorithm1(model, ablation(name, sigma=0.0, rho=0.0)).accumulate_gradients(batch, measure_ratio=True)
    assert len(passes.tokens) == 1
    assert result.losses[2] == 0
    assert result.gradient_ratio is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_every_ablation_trains(tmp_path: Path, name: str, rho: float) -> None:
    (record,) = train(tmp_path, Silent(), perturbation=name, rho=rho, epochs=1)["history"]
    assert record["gradient_ratio"] > 0
    assert all(math.isfinite(x) for x in record["train"].values())
    assert record["train"]["perturbed"] > 0
    assert (record["train"]["masked"] > 0) == (rho > 0)


@pytest.mark.parametrize("name", ABLATIONS)
def test_resumption_gives_the_same_bits(tmp_path: Path, name: str) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = train(whole, Silent(), perturbation=name)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(3), perturbation=name)
    assert train(stopped, Silent(), perturbation=name) == expected
    for file in ("metrics.json", "model.safetensors", STATE_FILE):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), file


def test_the_ablations_differ_from_each_other_and_from_app(tmp_path: Path) -> None:
    weights = set()
    for name in ("gradient", *ABLATIONS):
        train(tmp_path / name, Silent(), perturbation=name, epochs=1)
        weights.add((tmp_path / name / "model.safetensors").read_bytes())
    assert len(weights) == 4


FIELDS = {"perturbation": "pgd", "embedding_radius": 0.02, "pgd_steps": 5}


def test_the_fields_survive_json() -> None:
    model, config = preset("compact")
    config = dataclasses.replace(config, **FIELDS)
    values = json.loads(json.dumps(configs_to_json(model, config)))
    assert {name: values["train"][name] for name in FIELDS} == FIELDS
    assert configs_from_json(values) == (model, config)


def test_a_configuration_from_before_the_fields_is_app() -> None:
    values = configs_to_json(*preset("paper"))
    for name in FIELDS:
        del values["train"][name]
    assert configs_from_json(values) == preset("paper")
    assert configs_from_json(values)[1].perturbation == "gradient"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("perturbation", "none"),
        ("embedding_radius", 0.0),
        ("embedding_radius", -1),
        ("pgd_steps", 0),
        ("pgd_steps", 2.0),
    ],
)
def test_bad_values_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field} must be .*got"):
        dataclasses.replace(TRAIN, **{field: value})


@pytest.mark.parametrize("present", [True, False])
def test_the_command_line_takes_the_fields_from_the_configuration_of_a_run(tmp_path: Path, present: bool) -> None:
    write_npz(small_data(), tmp_path / "data.npz")
    data = load(str(tmp_path / "data.npz"))
    config = run_config(data, **(FIELDS if present else {}), epochs=1)
    values = config.to_json()
    if not present:
        for name in FIELDS:
            del values["train"][name]
    out, directly = tmp_path / "run", tmp_path / "directly"
    for directory in (out, directly):
        directory.mkdir()
    write_json(out / "config.json", values)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--out", str(out), "--resume", "--device", "cpu"])
    assert RunConfig.read(out) == config
    assert read_json(out / "metrics.json") == train_run(config, data, directly, CPU, Silent())

"""Figure 4b: APP of the unimodal encoders, the multi-modal encoder, the decoder, and their combinations."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import MODEL, TRAIN, Silent, StopAt, train
from step_twins import DROPOUT, compare, make_batch, make_model, run
from torch import Tensor

from mmer_fast import cli
from mmer_fast.data import Batch
from mmer_fast.models import RobMMR
from mmer_fast.training import Algorithm1, FastStep, TrainConfig, configs_from_json, configs_to_json
from mmer_fast.training.config import check_pair
from mmer_fast.training.files import STATE_FILE
from mmer_fast.training.perturbation import app_parameters

MODULES = {"unimodal": "unimodal_encoders.", "multimodal": "multimodal_encoder.", "decoder": "decoder."}
COMBINATIONS = ["+".join(c) for n in (1, 2, 3) for c in itertools.combinations(MODULES, n)]
every_combination = pytest.mark.parametrize("modules", COMBINATIONS)


def perturbing(modules: str, **changes: Any) -> TrainConfig:
    return dataclasses.replace(TRAIN, **{"perturbed_modules": modules, "gamma": 0.5, **changes})


def weights_of_the_passes(step: Algorithm1, batch: Batch) -> list[dict[str, Tensor]]:
    """The parameters as they are in each forward pass of D, hence also of the passes below it."""
    passes: list[dict[str, Tensor]] = []
    model = step.model
    part = model.decoder or model.classifier
    hook = part.register_forward_pre_hook(
        lambda *_: passes.append({name: p.detach().clone() for name, p in model.named_parameters()})
    )
    run(step, batch)
    hook.remove()
    return passes


def named(model: RobMMR, config: TrainConfig) -> set[str]:
    chosen = {id(p) for p in app_parameters(model, config)}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def direction(model: RobMMR, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """γ g/|g| of Eq. 14 by autograd on one graph, g that of L_r or of L_r + ρ L_m with reversed gradients."""
    step = Algorithm1(model, config)
    clean = model(batch.features, batch.lengths)
    loss = step.recognition_loss(clean.logits, batch.labels)
    if config.app_gradient == "total":
        masked = model(batch.features, batch.lengths, model.temporal_masks(clean.encodings))
        loss = loss + config.rho * step.recognition_loss(masked.logits, batch.labels)
    parameters = {name: p for name, p in model.named_parameters() if name in named(model, config)}
    g = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    whole = torch.cat([x.flatten() for x in g.values()]).norm()
    return {name: config.gamma * x / whole for name, x in g.items()}


def check_step(passes: list[dict[str, Tensor]], expected: Mapping[str, Tensor]) -> None:
    for name, clean in passes[0].items():
        step = passes[-1][name] - clean
        torch.testing.assert_close(step, expected.get(name, torch.zeros_like(step)), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", [Algorithm1, FastStep])
@pytest.mark.parametrize(
    ("reversal", "app_gradient"), [("mask_network", "recognition"), ("scores", "recognition"), ("scores", "total")]
)
@every_combination
def test_the_step_is_eq_14_in_the_modules_named_and_nowhere_else(
    modules: str, reversal: str, app_gradient: str, kind: type[Algorithm1]
) -> None:
    model, batch, config = make_model(reversal=reversal), make_batch(), perturbing(modules, app_gradient=app_gradient)
    prefixes = tuple(MODULES[name] for name in modules.split("+"))
    assert named(model, config) == {
        name
        for name, p in model.named_parameters()
        if name.startswith(prefixes) and p.dim() == 2 and name != "decoder.queries"
    }
    check_step(weights_of_the_passes(kind(model, config), batch), direction(model, batch, config))


@pytest.mark.parametrize(("dropout", "measure"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"app_gradient": "total"},
        {"perturbation": "random"},
        {"rho": 0.0},
        {"perturbed": "all", "perturbation_norm": "tensor"},
        {"perturbed": "attention"},
        {"share_dropout": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("reversal", ["mask_network", "scores"])
def test_the_fast_step_has_the_gradients_of_the_textbook_where_the_unimodal_encoders_are_perturbed(
    reversal: str, changes: dict[str, Any], dropout: bool, measure: bool
) -> None:
    model = make_model(reversal=reversal, **(DROPOUT if dropout else {}))
    compare(model, perturbing("unimodal+decoder", **changes), make_batch(), measure=measure)


@pytest.mark.parametrize("modules", ["decoder", "multimodal+decoder"])
@pytest.mark.parametrize("reversal", ["mask_network", "scores"])
def test_the_fast_step_shares_the_clean_encodings_where_they_are_not(modules: str, reversal: str) -> None:
    model, runs = make_model(reversal=reversal), []
    hook = model.unimodal_encoders["audio"].register_forward_hook(lambda *_: runs.append(1))
    FastStep(model, perturbing(modules)).accumulate_gradients(make_batch())
    hook.remove()
    assert len(runs) == 2
    compare(model, perturbing(modules), make_batch(), measure=True)


@every_combination
def test_lstms_are_perturbed_in_their_weight_matrices(modules: str) -> None:
    model, config = make_model(encoder="lstm", unimodal_blocks=2), perturbing(modules)
    lstms = {name for name, p in model.named_parameters() if ".lstm." in name and p.dim() == 2}
    prefixes = tuple(MODULES[name] for name in modules.split("+"))
    chosen = {name for name in lstms if name.startswith(prefixes)}
    assert {name for name in named(model, config) if not name.startswith("decoder.")} == chosen
    batch = make_batch()
    check_step(weights_of_the_passes(FastStep(model, config), batch), direction(model, batch, config))
    compare(model, config, batch)


@pytest.mark.parametrize("app_gradient", ["recognition", "total"])
def test_bfloat16_steps_along_nearly_the_same_g(app_gradient: str) -> None:
    model, batch = make_model(torch.float32), make_batch(dtype=torch.float32)
    config = perturbing("unimodal", app_gradient=app_gradient, precision="bfloat16")
    passes = weights_of_the_passes(FastStep(model, config), batch)
    expected = direction(model, batch, config)
    got = torch.cat([(passes[-1][name] - passes[0][name]).flatten() for name in expected])
    exact = torch.cat([x.flatten() for x in expected.values()])
    assert got.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert 0 < (got - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("modules", ["unimodal", "decoder", "unimodal+multimodal+decoder"])
def test_every_combination_trains_and_resumes_to_the_same_bits(tmp_path: Path, modules: str) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = train(whole, Silent(), perturbed_modules=modules)
    assert all(record["train"]["perturbed"] > 0 for record in expected["history"])
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(3), perturbed_modules=modules)
    assert train(stopped, Silent(), perturbed_modules=modules) == expected
    assert (stopped / STATE_FILE).read_bytes() == (whole / STATE_FILE).read_bytes()


# Configuration.


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("decoder", "decoder"),
        ("multimodal+unimodal", "unimodal+multimodal"),
        ("decoder+multimodal+unimodal", "unimodal+multimodal+decoder"),
    ],
)
def test_the_order_of_the_names_does_not_matter(given: str, kept: str) -> None:
    config = dataclasses.replace(TRAIN, perturbed_modules=given)
    assert config == dataclasses.replace(TRAIN, perturbed_modules=kept)
    assert config.perturbed_modules == kept
    assert configs_from_json(json.loads(json.dumps(configs_to_json(MODEL, config)))) == (MODEL, config)


@pytest.mark.parametrize("value", ["", "encoder", "decoder+decoder", "unimodal multimodal", "unimodal+", None])
def test_bad_names_are_answered_with_the_good_ones(value: object) -> None:
    expected = "str" if value is None else "some of unimodal, multimodal, decoder"
    with pytest.raises(ValueError, match=rf"TrainConfig\.perturbed_modules must be {expected}.*got"):
        dataclasses.replace(TRAIN, perturbed_modules=value)


MISMATCHES = [
    ({"fusion": "concatenation"}, {}, r"perturbed_modules .*RobMMRConfig\.fusion='concatenation'.* got 'multimodal'"),
    ({"head": "linear"}, {"perturbed_modules": "decoder"}, r"perturbed_modules .*RobMMRConfig\.head='linear'"),
    ({"head": "linear"}, {"perturbed_modules": "multimodal+decoder"}, r"perturbed_modules .*without 'decoder'"),
    ({"encoder": "lstm"}, {"perturbed": "attention"}, r"perturbed must be 'projections' or 'all'.*lstm"),
    (
        {"encoder": "lstm"},
        {"perturbed": "feed_forward", "perturbed_modules": "unimodal+decoder"},
        r"perturbed must be 'projections' or 'all'",
    ),
]


@pytest.mark.parametrize(("model", "training", "message"), MISMATCHES)
def test_what_the_model_has_not_cannot_be_perturbed(
    model: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    network, config = make_model(**model), dataclasses.replace(TRAIN, **training)
    for kind in (Algorithm1, FastStep):
        with pytest.raises(ValueError, match=rf"TrainConfig\.{message}"):
            kind(network, config)
    with pytest.raises(ValueError, match=message):
        configs_from_json(configs_to_json(network.config, config))
    for off in ({"sigma": 0.0}, {"perturbation": "fgsm"}):
        check_pair(network.config, dataclasses.replace(config, **off))


def test_the_decoder_beside_lstms_has_its_attention() -> None:
    model = make_model(encoder="lstm")
    assert named(model, perturbing("decoder", perturbed="attention"))
    compare(model, perturbing("decoder", perturbed="attention"), make_batch())


def test_the_command_line_says_a_mismatch_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--out", str(tmp_path / "run"), "--set", "fusion=concatenation"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "TrainConfig.perturbed_modules must be without 'multimodal'" in error
    assert not (tmp_path / "run").exists()

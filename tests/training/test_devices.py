"""Training on each device: the CPU, and a GPU where there is one (`make gpu-check`), which is held to the CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import MODEL, Silent, StopAt, small_data, train
from step_twins import make_batch, make_model, run, shrunk
from torch import Tensor

from mmer_fast.training import Algorithm1, FastStep
from mmer_fast.training.evaluate import predict_logits
from mmer_fast.training.files import STATE_FILE
from mmer_fast.training.graphed_step import GraphedStep
from mmer_fast.training.run import load_best

CPU = torch.device("cpu")


GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cuda.matmul.allow_tf32 = allowed


gpu_alone = pytest.mark.parametrize("device", [GPU], indirect=True)


def gradients_on(device: torch.device, kind: type[Algorithm1], name: str = "paper") -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients in float32 without dropout, on the CPU."""
    values, config = shrunk(name)
    values.update(dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)
    model = make_model(torch.float32, **values).to(device)
    result, found = run(kind(model, config), make_batch(dtype=torch.float32).to(device))
    return result.losses.cpu(), {n: g.cpu() for n, g in found.items() if g is not None}


@gpu_alone
@pytest.mark.parametrize("preset", ["paper", "authors"])
@pytest.mark.parametrize("kind", [FastStep, Algorithm1])
def test_a_step_has_the_gradients_of_the_textbook_on_the_cpu(
    device: torch.device, kind: type[Algorithm1], preset: str
) -> None:
    losses, got = gradients_on(device, kind, preset)
    expected_losses, expected = gradients_on(CPU, Algorithm1, preset)
    torch.testing.assert_close(losses, expected_losses, rtol=2e-4, atol=1e-6)
    assert got.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, g in expected.items():
        # The reversed gradients of the scores pass through slopes of the top-k operator of 1/epsilon.
        torch.testing.assert_close(
            got[name], g, rtol=0, atol=2e-3 * max(float(g.abs().max()), 1e-3 * largest), msg=name
        )


@gpu_alone
def test_a_step_waits_for_nothing(device: torch.device) -> None:
    values, config = shrunk("paper")
    step, batch = FastStep(make_model(torch.float32, **values).to(device), config), make_batch(dtype=torch.float32)
    run(step, batch.to(device))  # compiles, and makes what is made once
    batch = batch.to(device)
    try:
        torch.cuda.set_sync_debug_mode("error")
        run(step, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_alone
@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16"}], ids=str)
def test_a_replayed_step_has_the_gradients_of_the_step(device: torch.device, changes: dict[str, Any]) -> None:
    values, config = shrunk("paper")
    values.update(dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)
    config = dataclasses.replace(config, **changes)
    model = make_model(torch.float32, **values).to(device)
    graphed, eager = GraphedStep(model, dataclasses.replace(config, cuda_graph=True)), FastStep(model, config)
    for turn, samples in enumerate((6, 6, 6, 5, 5, 5, 6, 6)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)  # in place, as an optimizer does
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        batch = make_batch(samples, torch.float32)
        for x_btf in batch.features.values():
            x_btf.mul_(1 + turn)
        batch.lengths["video"][turn % samples] = 1
        batch = batch.to(device)
        (result, got), (expected_result, expected) = run(graphed, batch), run(eager, batch)
        torch.testing.assert_close(result.losses, expected_result.losses, rtol=1e-4, atol=1e-6)
        largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
        for name, g in expected.items():
            if g is not None:
                atol = 2e-3 * max(float(g.abs().max()), 1e-3 * largest) if not changes else 0.05 * largest
                torch.testing.assert_close(got[name], g, rtol=0, atol=atol, msg=name)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [graph.replay is not None for graph in graphed._graphs.values()] == [True, True]


@gpu_alone
def test_replays_draw_new_numbers(device: torch.device) -> None:
    values, config = shrunk("paper")
    config = dataclasses.replace(config, cuda_graph=True)
    step = GraphedStep(make_model(torch.float32, **{**values, "dropout": 0.3}).to(device), config)
    batch = make_batch(dtype=torch.float32).to(device)
    for _ in range(2):
        step.model.zero_grad()
        step.accumulate_gradients(batch)
    found = []
    for _ in range(2):
        step.model.zero_grad()
        found.append(step.accumulate_gradients(batch).logits)
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"workers": 2},
        {"precision": "bfloat16"},
        {"share_dropout": True},
        pytest.param({"cuda_graph": True, "log_every": 4}, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_a_resumed_training_ends_with_the_same_bits(
    device: torch.device, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "cuda_graph" in changes and device.type == "cpu":
        pytest.skip("graphs are for CUDA")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = train(whole, Silent(), device=device, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(3), device=device, **changes)
    assert train(stopped, Silent(), device=device, **changes) == expected
    for file in ("metrics.json", "model.safetensors", STATE_FILE):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), file
    for record in expected["history"]:
        assert all(math.isfinite(x) for x in record["train"].values())


@gpu_alone
def test_the_epochs_have_the_losses_of_the_cpu(device: torch.device, tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0)
    got, expected = (
        train(tmp_path / f"{i}", Silent(), model, device=where, epochs=3)["history"]
        for i, where in enumerate((device, CPU))
    )
    for a, b in zip(got, expected, strict=True):
        for name in ("recognition", "masked"):
            assert a["train"][name] == pytest.approx(b["train"][name], rel=2e-3), name


@gpu_alone
def test_a_model_of_this_device_predicts_the_same_on_the_cpu(device: torch.device, tmp_path: Path) -> None:
    train(tmp_path / "run", Silent(), device=device)
    split = small_data().splits["test"]
    here, there = (predict_logits(load_best(tmp_path / "run", where)[0], split) for where in (device, CPU))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)

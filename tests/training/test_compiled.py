"""The step with its transformers compiled: the gradients of the step without."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import MODEL, TRAIN, Silent, StopAt, run_config, small_data, small_model, train

from mmer_fast.data import Batch, SequenceDataset
from mmer_fast.models import RobMMR
from mmer_fast.training import configs_from_json, configs_to_json, preset, steps
from mmer_fast.training.compiled import compile_stacks
from mmer_fast.training.fast_step import FastStep
from mmer_fast.training.files import PREVIOUS_FILE, STATE_FILE
from mmer_fast.training.run import train_run

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.2}


@pytest.fixture(autouse=True)
def _afresh() -> Any:
    """No graph of another test, and torch's setting as it was."""
    import torch._functorch.config

    before = torch._functorch.config.donated_buffer
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = before


def _batch(samples: int) -> Batch:
    return SequenceDataset(small_data().splits["train"]).__getitems__(range(samples))


def test_gradients_are_those_of_the_step_without() -> None:
    """Of batches of different sizes by one graph, and where the backward pass of E^x runs twice."""
    plain = small_model(small_data(), dataclasses.replace(MODEL, **DROPOUT, reversal="scores"))
    compiled = copy.deepcopy(plain)
    compile_stacks(compiled, backend="aot_eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    config = dataclasses.replace(TRAIN, gamma=0.5, app_gradient="total")
    for samples, measured in ((6, False), (9, True)):
        results = []
        for network in (plain, compiled):
            network.zero_grad()
            torch.manual_seed(7)
            result = FastStep(network, config).accumulate_gradients(_batch(samples), measure_ratio=measured)
            gradients = [p.grad for p in network.parameters()]
            results.append([result.losses, result.logits, *gradients])
            assert (result.gradient_ratio is not None) == measured
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_without_the_field_nothing_is_compiled() -> None:
    values = configs_to_json(*preset("compact"))
    del values["train"]["compile"]
    assert not configs_from_json(values)[1].compile


def test_an_lstm_is_not_compiled() -> None:
    values = configs_to_json(*preset("compact"))
    values["model"]["encoder"] = "lstm"
    values["train"]["compile"] = True
    with pytest.raises(ValueError, match=r"TrainConfig\.compile must be False with RobMMRConfig\.encoder='lstm', got"):
        configs_from_json(values)


@pytest.mark.slow
def test_a_run_with_inductor_learns_what_one_without_does(tmp_path: Path) -> None:
    data = small_data()
    model = dataclasses.replace(MODEL, **NO_DROPOUT)
    losses = []
    for compiled in (False, True):
        directory = tmp_path / str(compiled)
        directory.mkdir()
        config = dataclasses.replace(run_config(data, compile=compiled), model=model)
        history = train_run(config, data, directory, torch.device("cpu"), Silent())["history"]
        losses.append([list(record["train"].values()) for record in history])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """With dropout. As in another process the graphs are made anew, of a first batch of another size."""
    compiled = 0

    def compile_(model: RobMMR) -> None:
        nonlocal compiled
        compiled += 1
        torch.compiler.reset()
        compile_stacks(model, backend)

    monkeypatch.setattr(steps, "compile_stacks", compile_)
    expected = train(tmp_path / "whole", Silent(), compile=True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", StopAt(4), compile=True)
    observer = Silent()
    assert train(tmp_path / "stopped", observer, compile=True) == expected
    assert (compiled, observer.steps) == (3, 5)
    for name in ("metrics.json", "model.safetensors", PREVIOUS_FILE, STATE_FILE):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

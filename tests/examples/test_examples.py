"""The examples run, at smaller sizes, and what they print is so."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sam_learns_the_classes_behind_wrong_labels(capsys: pytest.CaptureFixture[str]) -> None:
    result = load("sam_classifier").main(samples=200, epochs=7, wrong=0.2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["SGD", "SAM"] == list(result)
    assert [line.split()[1] for line in lines] == ["14", "7"]  # SGD gets as many passes
    assert all(accuracy > 0.35 for accuracy in result.values())  # of ten classes
    assert result["SGD"] != result["SAM"]


def test_the_language_model_learns_and_app_holds_it_back(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("app_language_model")
    result = example.main(sentences=60, epochs=10, width=24)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["natural", "natural", "APP", "APP"]
    for curve in result.values():
        assert curve[-1][0] < 0.8 * curve[0][0]  # training perplexity falls
        assert all(math.isfinite(seen) and math.isfinite(unseen) for seen, unseen in curve)
        assert min(unseen for _, unseen in curve) < 0.9 * example.VOCABULARY  # better than a guess
    assert result["APP"][-1][0] > result["natural"][-1][0]  # a regulariser fits the training data less closely


def test_the_step_of_app_leaves_the_weights_to_the_optimizer() -> None:
    example = load("app_language_model")
    model = example.LanguageModel(16)
    before = [p.detach().clone() for p in model.parameters()]
    tokens, *_ = example.make_language(8, 1)
    gradients = []
    for radius in (0.0, 0.3):
        example.step(model, torch.optim.SGD(model.parameters(), lr=0.0), tokens, radius)
        assert all(map(torch.equal, model.parameters(), before))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert not all(map(torch.equal, *gradients))  # the second loss adds to them


def test_the_reference_model_learns_by_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    table = load("sam_robmmr").main(samples=64, epochs=3, dim=16)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", "natural", "SAM", "APP"]
    assert len({row["loss_before"] for row in table.values()}) == 1
    for row in table.values():
        assert row["loss_after"] < 0.9 * row["loss_before"]
        assert 0 <= row["valid"] <= 1
    assert len({row["loss_after"] for row in table.values()}) == 3


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_how_to_run_it(script: Path) -> None:
    first, *rest = script.read_text().splitlines()
    assert first.endswith(f'python examples/{script.name}"""')
    assert len(rest) < 80


def test_a_script_runs_from_the_command_line() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", FOLDER / "app_language_model.py"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 5

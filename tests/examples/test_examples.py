"""The examples run, at smaller sizes, and what they print is so."""

from __future__ import annotations

import ast
import importlib.util
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
SOURCES = sorted(path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where torch.compile looks for the names that a function uses
    spec.loader.exec_module(module)
    return module


def test_sam_learns_the_classes_behind_wrong_labels(capsys: pytest.CaptureFixture[str]) -> None:
    result = load("sam_classifier").main(samples=200, epochs=7, wrong=0.2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["SGD", "SAM"] == list(result)
    assert [line.split()[1] for line in lines] == ["14", "7"]  # SGD gets as many passes
    assert all(accuracy > 0.35 for accuracy in result.values())  # of ten classes
    assert result["SGD"] != result["SAM"]


def test_sam_trains_with_a_scaler_that_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: in float16, for which the GradScaler is enabled."""
    example, scales = load("sam_classifier"), []
    update = torch.amp.GradScaler.update

    def noted(scaler: torch.amp.GradScaler) -> None:
        scales.append(scaler.get_scale())
        update(scaler)

    monkeypatch.setattr(example, "DTYPE", torch.float16)
    monkeypatch.setattr(torch.amp.GradScaler, "update", noted)
    result = example.main(samples=200, epochs=7, wrong=0.2)
    assert len(scales) == (14 + 7) * 4
    assert min(scales) > 1.0
    assert all(accuracy > 0.35 for accuracy in result.values())


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


def test_the_vision_transformer_finds_the_important_patches(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("topk_vision_transformer")
    result = example.main(steps=100)
    assert len(capsys.readouterr().out.splitlines()) == 2
    for row in result.values():
        assert row["accuracy"] > 0.8  # of four classes
        assert row["kept"] > 0.5  # by chance 0.08


def test_the_hard_choice_of_patches_is_the_limit_of_the_soft_one() -> None:
    example = load("topk_vision_transformer")
    model, images = example.SelectiveTransformer(), torch.randn(5, example.PATCHES, example.PIXELS)
    (soft, weights), (hard, chosen) = model(images, 1e-6), model(images, None)
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights, chosen, rtol=0, atol=1e-4)
    model(images, 0.1)[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.score.parameters())


def test_every_row_learns_its_own_k(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("learned_k")
    result = example.main()
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert len(result["relevant"].unique()) > 3
    assert (result["learned k"] - result["relevant"]).abs().max() < 1
    assert example.main(price=2.0)["learned k"].max() < 1  # an entry costs more than it brings


@pytest.fixture
def transformers() -> None:
    with warnings.catch_warnings():  # what it deprecates in itself is not ours
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers.models.bert.modeling_bert", reason="transformers is not installed")


@pytest.mark.usefixtures("transformers")
def test_temporal_masking_hides_what_the_model_relies_on(capsys: pytest.CaptureFixture[str]) -> None:
    result = load("atm_bert").main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["natural", "ATM"]
    (_, natural_silent, _), (accuracy, silent, hidden) = result["natural"], result["ATM"]
    assert accuracy > 0.9
    assert silent > natural_silent + 0.03
    assert hidden > 0.45  # by chance 0.4


@pytest.mark.usefixtures("transformers")
def test_the_mask_network_climbs_what_the_encoder_descends() -> None:
    example = load("atm_bert")
    torch.manual_seed(0)
    model, (features, lengths, labels, _) = example.MaskedEncoder().eval(), example.make_sequences(16, 0)

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(features, lengths, 0.4), labels)

    before = loss()
    before.backward()
    for name, direction in (("score", 1), ("head", -1)):
        parameters = list(getattr(model, name).parameters())
        with torch.no_grad():
            for p in parameters:
                p -= 1e-2 * p.grad / p.grad.norm()
            assert (loss() - before) * direction > 0, name
            for p in parameters:
                p += 1e-2 * p.grad / p.grad.norm()


@pytest.mark.usefixtures("transformers")
def test_our_attention_gives_the_logits_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    result = load("attention_bert").main(samples=4, length=9)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert max(result["eager"], result["sdpa"]) < 1e-4
    assert result["weight 0"] < 1e-5
    assert result["gradient"] > 0


def test_compiled_and_exported_operators_agree(capsys: pytest.CaptureFixture[str]) -> None:
    torch.compiler.reset()
    example = load("compile_export")
    result = example.main(backend="aot_eager")
    assert len(capsys.readouterr().out.splitlines()) == len(result) == 8
    assert all(difference < 1e-6 for pair in result.values() for difference in pair)
    attention = {"attention_forward"}
    nodes = {name: attention for name in result if "attention" in name}
    nodes |= {name: {"soft_topk_forward"} for name in ("soft_topk", "temporal_mask")}
    nodes |= {name: set() for name in result if "kl_with_logits" in name}  # torch's own operators
    nodes["perturb_ and restore_"] = {"perturb_", "restore_"}
    for name, (function, inputs) in example.make_cases(2).items():
        before = [x.clone() for x in inputs]
        loaded = example.round_trip(function, inputs)
        targets = [str(node.target).split(".") for node in loaded.graph.nodes]
        assert {target[1] for target in targets if target[0] == "mmer_fast"} == nodes[name], name
        assert loaded(*inputs).abs().max() > 1e-3
        assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_how_to_run_it(script: Path) -> None:
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    assert docstring is not None
    assert docstring.splitlines()[0].endswith(f": python examples/{script.name}")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_an_example_is_short_and_in_the_readme(source: Path) -> None:
    assert len(source.read_text().splitlines()) < 80
    readme = (FOLDER.parent / "README.md").read_text()
    assert f"]({source.relative_to(FOLDER.parent)})" in readme


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

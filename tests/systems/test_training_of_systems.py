"""A sister system goes through the trainer, the commands, the report and a comparison as RobMMR does."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_system import Conversations, Toy, ToyConfig
from typer.testing import CliRunner

import mmer_fast.training
from mmer_fast.ablation.comparison import comparison
from mmer_fast.ablation.plan import make_plan
from mmer_fast.data import MultiModalData, SequenceDataset, make_synthetic, write_npz
from mmer_fast.report.analysis import DataCache, analyse
from mmer_fast.systems import registry
from mmer_fast.training.api import Run
from mmer_fast.training.commands import app
from mmer_fast.training.loop_config import LoopConfig
from mmer_fast.training.observers import Observers
from mmer_fast.training.order import epoch_batches, sorted_batches, steps_per_epoch
from mmer_fast.training.run import RunConfig, RunError, configured_run, train_run
from mmer_fast.training.settings import Settings, asked_for, configure
from mmer_fast.training.steps import LossStep
from mmer_fast.training.systems import find_system


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SISTERS, "toy", "toy_system:Toy")
    monkeypatch.setitem(registry.SISTERS, "conversations", "toy_system:Conversations")


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    made = make_synthetic(3, n_train=30, n_valid=12, n_test=21, max_length=10).select(["audio", "video"])
    for split in made.splits.values():
        split.extras = {name: values for name, values in split.extras.items() if name == "shift"}
    return made


@pytest.fixture(scope="module")
def single(data: MultiModalData) -> MultiModalData:
    """One label a sample, and the extras that conversations have."""
    splits = {}
    for name, split in data.splits.items():
        labels_nk = np.zeros_like(split.labels)
        labels_nk[np.arange(len(split)), np.argmax(split.labels, axis=1)] = 1
        extras = {"dialogue": np.arange(len(split)) // 3}
        extras |= {f"va_{modality}": np.zeros((len(split), 2)) for modality in data.modalities}
        splits[name] = dataclasses.replace(split, labels=labels_nk, extras=extras)
    return dataclasses.replace(data, splits=splits)


def test_the_step_of_a_system_weighs_its_gradients_and_not_its_losses(data: MultiModalData) -> None:
    batch, results, gradients = SequenceDataset(data.splits["train"]).__getitems__(range(6)), [], []
    model = Toy(data.modalities, len(data.label_names), ToyConfig(decay=0.1))
    for weight in (1.0, 0.25):
        model.zero_grad()
        results.append(LossStep(model).accumulate_gradients(batch, weight=weight))
        gradients.append(model.layer.weight.grad.clone())
    torch.testing.assert_close(gradients[1], 0.25 * gradients[0])
    assert torch.equal(results[1].losses, results[0].losses)


def test_a_system_trains_and_is_there_again(data: MultiModalData, tmp_path: Path) -> None:
    run = mmer_fast.training.train(data, tmp_path / "run", model="toy", decay=0.01, show=False, device="cpu")
    assert [set(record["train"]) for record in run.metrics["history"]] == [{"recognition", "decay", "micro_f1"}] * 2
    first, last = (run.metrics["history"][i]["train"]["recognition"] for i in (0, 1))
    assert last < first
    assert run.metrics["mask_recall"] == {}
    again = Run(tmp_path / "run", "cpu")
    assert again.config.system == "toy"
    assert again.config.model.decay == 0.01
    assert isinstance(again.model, Toy)
    assert again.model.fitted == 30
    assert again.evaluate(data) == run.metrics["test"]
    assert again.predict(data).probabilities.shape == (21, 6)
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "<title>Toy: run" in page
    assert "Other parts of the loss" in page
    assert "What the masks hide" not in page
    assert (tmp_path / "run/curves.png").stat().st_size > 1000


class StopAt(Observers):
    """Raises KeyboardInterrupt after a number of steps, as a signal would."""

    def __init__(self, steps: int) -> None:
        super().__init__([])
        self.left = steps

    def on_step(self, *arguments: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_resuming_gives_the_same_bits(data: MultiModalData, tmp_path: Path) -> None:
    kind = find_system("toy")
    config = configured_run(kind, kind.preset("compact"), data)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoint_every=1))

    def train(name: str, steps: int) -> dict[str, Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        return train_run(config, data, tmp_path / name, torch.device("cpu"), StopAt(steps))

    whole = train("whole", 100)
    with pytest.raises(KeyboardInterrupt):
        train("stopped", 6)
    with pytest.raises(RunError, match="model: expected one; got robmmr, toy of options, file and run"):
        mmer_fast.training.train(data, tmp_path / "stopped", model="robmmr", resume=True, show=False)
    assert train("stopped", 100) == whole
    model = Run(tmp_path / "stopped", "cpu").model
    assert isinstance(model, Toy)
    assert model.started == whole["best_epoch"] - 1


def test_classes_are_chosen_and_measured_as_classes(single: MultiModalData, tmp_path: Path) -> None:
    run = mmer_fast.training.train(
        single, tmp_path / "run", model="toy", classes=True, selection="weighted_f1", show=False, device="cpu"
    )
    test = run.metrics["test"]
    predicted_nk = torch.from_numpy(run.predict(single).probabilities)
    torch.testing.assert_close(predicted_nk.sum(dim=1), torch.ones(21))
    right = (predicted_nk.argmax(dim=1).numpy() == single.splits["test"].labels.argmax(axis=1)).mean()
    assert test["overall_accuracy"] == pytest.approx(right)
    assert test["micro_f1"] == pytest.approx(right)  # one label a sample, one predicted
    assert 0 <= test["unweighted_accuracy"] <= 1
    analysis = analyse(run.directory, "run", DataCache(single), torch.device("cpu"), timing=False)
    assert analysis.labels is not None
    assert [label.f1 for label in analysis.labels] == pytest.approx(test["per_label_f1"])
    page = (run.directory / "report.html").read_text(encoding="utf-8")
    assert "of classes the most probable one is predicted" in page
    assert "a label is predicted above" not in page


@pytest.mark.parametrize(
    "name", ["m3er", "mmgcn", "mmin", "cross-culture", "semi-supervised", "univa", "mult", "hhmpn"]
)
def test_what_was_published_without_weight_decay_has_none(name: str) -> None:
    assert find_system(name).preset("authors")[1].weight_decay == 0


def test_dialogues_stay_whole(single: MultiModalData, tmp_path: Path) -> None:
    split = single.splits["train"]
    config = LoopConfig(batch_size=4)
    for bucket in (False, True):
        chunks = epoch_batches(split, dataclasses.replace(config, bucket_by_length=bucket), 0, "dialogue")
        assert len(chunks) == steps_per_epoch(split, config, "dialogue") == 3
        assert sorted(torch.cat(chunks).tolist()) == list(range(30))
        for chunk in chunks:
            firsts = chunk[::3]
            assert (firsts % 3 == 0).all()
            assert chunk.tolist() == (firsts[:, None] + torch.arange(3)).flatten().tolist()
    first, second = (epoch_batches(split, config, epoch, "dialogue")[0].tolist() for epoch in (0, 1))
    assert first != second
    assert [len(chunk) for chunk in sorted_batches(split, 7, "dialogue")] == [6, 6, 6, 6, 6]
    options: dict[str, Any] = {"model": "conversations", "batch_size": 4, "show": False, "device": "cpu"}
    run = mmer_fast.training.train(single, tmp_path / "run", **options)
    assert isinstance(run.model, Conversations)
    assert mmer_fast.training.train(single, tmp_path / "workers", workers=1, **options).metrics == run.metrics


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nothing", {}, r"model must be one of robmmr, .*got 'nothing'"),
        ("toy", {"rho": 0.1}, r"unknown setting.s. rho; known: model: classes, decay; train: "),
        ("toy", {"decay": "much"}, r"ToyConfig.decay must be float, got 'much'"),
        ("toy", {"preset": "paper"}, r"preset must be one of compact, authors with toy, got 'paper'"),
        ("toy", {"selection": "weighted_f1"}, r"one of labels, not of classes, with Toy, got 'weighted_f1'"),
        ("robmmr", {"selection": "weighted_f1"}, r"TrainConfig.selection must be one of micro_f1, macro_f1, accuracy"),
        ("conversations", {}, r"Conversations needs the extra.s. dialogue of train, va_audio of train"),
    ],
)
def test_what_does_not_fit_is_refused(
    data: MultiModalData, tmp_path: Path, model: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        mmer_fast.training.train(data, tmp_path / "run", model=model, show=False, device="cpu", **options)
    assert not (tmp_path / "run").exists()


def test_dialogues_do_not_accumulate(single: MultiModalData) -> None:
    kind = find_system("conversations")
    model, train = kind.preset("compact")
    with pytest.raises(RunError, match="accumulation must be 1 with Conversations, whose batches are whole, got 2"):
        configured_run(kind, (model, dataclasses.replace(train, accumulation=2)), single)


def test_configuration_files_name_the_system(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["config", "--model", "toy", "--set", "decay=0.5"])
    assert result.exit_code == 0
    assert "system: toy" in result.output
    path = tmp_path / "toy.yaml"
    path.write_text(result.output)
    asked = asked_for(path, None)
    assert (asked.system, configure(asked)[0].decay) == ("toy", 0.5)
    with pytest.raises(RunError, match="model: expected one; got robmmr, toy of options, file and run"):
        asked_for(path, "robmmr")


def test_an_older_run_is_one_of_robmmr(data: MultiModalData, tmp_path: Path) -> None:
    kind = find_system("robmmr")
    config = configured_run(kind, kind.preset("compact"), data)
    values = config.to_json()
    assert values.pop("system") == "robmmr"
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert RunConfig.read(tmp_path) == config


def test_the_command_line(data: MultiModalData, tmp_path: Path) -> None:
    path, out = tmp_path / "data.npz", tmp_path / "run"
    write_npz(data, path)
    result = CliRunner().invoke(app, ["train", "--model", "toy", "--data", str(path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert re.search(r"epoch 1/2  recognition \d\.\d{4}  decay \d", result.output)
    with pytest.raises(RunError, match="only RobMMR has masks to explain, got Toy"):
        Run(out, "cpu").explain(0)


def test_a_comparison_is_a_suite_of_systems(data: MultiModalData, tmp_path: Path) -> None:
    suite = comparison(["toy", "robmmr", "conversations"])
    plan = make_plan(suite, data, tmp_path, seeds=[0, 1], settings=Settings(values={"epochs": 3}))
    toy, robmmr, conversations = plan.rows
    assert [run.config.system for run in plan.chosen([])] == ["toy", "robmmr"] * 2
    assert [run.directory.name for run in toy.runs] == ["toy-seed0", "toy-seed1"]
    assert {run.config.train.epochs for row in (toy, robmmr) for run in row.runs} == {3}
    assert "needs the extra(s) dialogue of train" in (conversations.skipped or "")
    with pytest.raises(RunError, match=r"unknown setting.s. rho; known: model: classes"):
        make_plan(suite, data, tmp_path, seeds=[0], settings=Settings(values={"rho": 0.1}))
    with pytest.raises(RunError, match="models must be one or more different names, got toy, toy"):
        comparison(["toy", "toy"])
    with pytest.raises(RunError, match="model must be one of robmmr"):
        comparison(["nothing"])


def test_every_system_can_be_compared() -> None:
    assert [row.system for row in comparison(registry.NAMES).rows] == list(registry.NAMES)

"""The command line: training to files, killing and resuming, evaluating, predicting, and every refusal."""

from __future__ import annotations

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import mmer_fast, refused

from mmer_fast import cli
from mmer_fast.data import load, make_synthetic, write_npz
from mmer_fast.training import FastStep
from mmer_fast.training.checkpoint import CheckpointError, read_tensors

FOUR = ("Accuracy", "Hamming", "micro-F1", "macro-F1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data file with two modalities, 20 training samples."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    small = make_synthetic(1, n_train=20, n_valid=8, n_test=10, max_length=8).select(["audio", "video"])
    write_npz(small, path)
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert mmer_fast("train", "--data", data, "--out", out, "--epochs", 2, "--batch-size", 8, "--device", "cpu") == 0
    return out


def test_training_leaves_its_files(run: Path, data: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "curves.png",
        "metrics.json",
        "model.safetensors",
        "report.html",
        "state.previous.safetensors",
        "state.safetensors",
        "train.log",
    ]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["epochs"] == 2
    assert config["train"]["batch_size"] == 8
    assert config["model"]["dim"] == 128
    assert config["data"]["modalities"] == {"audio": 74, "video": 35}
    log = (run / "train.log").read_text()
    assert "epoch 1/2" in log
    assert "epoch 2/2" in log


def test_training_off_a_terminal_prints_plain_lines(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--epochs", 1, "--batch-size", 8, "--modalities", "video", "--seed", 5, "--lr", 2e-3)
    assert mmer_fast("train", "--data", data, "--out", tmp_path / "run", "--device", "cpu", *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\r" not in captured.out
    assert "\x1b" not in captured.out
    assert captured.out.count("epoch 1/1") == 1
    assert all(name in captured.out for name in FOUR)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["modalities"] == {"video": 35}
    assert (config["train"]["seed"], config["train"]["learning_rate"]) == (5, 2e-3)


def test_settings_come_from_a_file_then_assignments_then_options(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {dim: 16, ffn_dim: 24, heads: 2}\ntrain: {epochs: 3, seed: 1, rho: 0.5}\n")
    out = tmp_path / "run"
    given = ("--config", file, "--set", "epochs=2", "--set", "seed=2", "--epochs", 1)
    assert mmer_fast("train", "--data", data, "--out", out, "--device", "cpu", *given) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["dim"] == 16
    assert [config["train"][name] for name in ("epochs", "seed", "rho", "clip_norm")] == [1, 2, 0.5, 1.0]


def test_config_prints_a_file_that_train_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmer_fast("config", "--preset", "paper", "--set", "dim=64") == 0
    printed = capsys.readouterr().out
    (tmp_path / "paper.yaml").write_text(printed)
    assert mmer_fast("config", "--config", tmp_path / "paper.yaml") == 0
    assert capsys.readouterr().out == printed
    assert "dim: 64" in printed


def test_a_setting_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "train", "--out", tmp_path / "run", "--set", "rhoo=1")
    assert "unknown setting(s) rhoo" in message
    assert not (tmp_path / "run").exists()


def test_evaluate_repeats_the_metrics_of_the_run(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    for split in ("train", "valid", "test"):
        assert mmer_fast("evaluate", "--run", run, "--data", data, "--split", split, "--json") == 0
        assert json.loads(capsys.readouterr().out) == metrics[split]
    assert mmer_fast("evaluate", "--run", run, "--data", data) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in FOUR)


def test_predictions_are_written_as_csv_and_npz(run: Path, data: Path, tmp_path: Path) -> None:
    for name in ("p.csv", "p.npz"):
        assert mmer_fast("predict", "--run", run, "--data", data, "--out", tmp_path / name, "--split", "valid") == 0
    labels = load(data).label_names
    with np.load(tmp_path / "p.npz") as stored:
        probabilities, threshold = stored["probabilities"], float(stored["threshold"])
        assert stored["label_names"].tolist() == labels
    assert probabilities.shape == (8, 6)
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["sample"]) for row in rows] == list(range(8))
    for row, expected in zip(rows, probabilities, strict=True):
        np.testing.assert_allclose([float(row[label]) for label in labels], expected, atol=1e-6)
        named = [label for label, p in zip(labels, expected, strict=True) if p > threshold]
        assert row["predicted"] == ";".join(named)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "p.npz"]


def steps_done(state: Path) -> int:
    """Steps of the first epoch in a state file, or -1 if there is none yet."""
    try:
        progress = read_tensors(state)[1]
    except CheckpointError:
        return -1
    return progress["step"] + 1000 * progress["epoch"]


def test_a_killed_training_resumes_to_the_same_result(data: Path, tmp_path: Path) -> None:
    options = ["--data", data, "--epochs", 2, "--batch-size", 4, "--checkpoint-every", 1, "--device", "cpu"]
    assert mmer_fast("train", "--out", tmp_path / "whole", *options) == 0
    command = [sys.executable, "-m", "mmer_fast", "train", "--out", tmp_path / "killed", *options]
    killed = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while steps_done(tmp_path / "killed" / "state.safetensors") < 2:
        assert killed.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert mmer_fast("train", "--out", tmp_path / "killed", "--resume", "--device", "cpu") == 0
    for name in ("metrics.json", "model.safetensors", "state.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_second_run_into_the_same_directory_is_refused(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    message = refused(capsys, "train", "--data", data, "--out", run)
    assert "already holds a run" in message
    assert "--resume" in message
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--epochs", 5], "train.epochs: the run has 2, asked for 5"),
        (["--preset", "paper"], "model.dim: the run has 128, asked for 512"),
        (["--modalities", "video,audio"], "data.modalities"),
        (["--data", "synthetic"], "data.checksum.train"),  # it has audio and video too, and other samples
    ],
)
def test_resuming_with_another_configuration_names_the_fields(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], field: str
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert field in refused(capsys, "train", "--out", run, "--resume", *arguments)
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_resuming_nothing_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path / "none", tmp_path):
        message = refused(capsys, "train", "--data", data, "--out", out, "--resume")
        assert "no run to resume" in message
    assert list(tmp_path.iterdir()) == []


class Touch:
    """A pickle that creates a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (self.path,)


def test_bad_data_is_refused_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil, text, partial = tmp_path / "evil.pt", tmp_path / "text.npz", tmp_path / "partial.npz"
    torch.save({"train": Touch(tmp_path / "executed")}, evil)
    text.write_text("not a data set")
    np.savez(partial, train_audio=np.zeros((2, 3, 4), np.float32), train_labels=np.ones((2, 1)), label_names=["x"])
    (tmp_path / "evil.npz").write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    for source in (evil, text, partial, tmp_path / "evil.npz", tmp_path / "absent.npz", tmp_path):
        message = refused(capsys, "train", "--data", source, "--out", tmp_path / "run")
        assert source.name in message
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modalities", "audio,smell"], "smell"),
        (["--device", "tpu7"], "--device"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--epochs", 0], "TrainConfig.epochs"),
        (["--lr", -1], "TrainConfig.learning_rate"),
        (["--preset", "large"], "preset must be one of paper, authors, compact with robmmr, got 'large'"),
        (["--model", "large"], "model must be one of robmmr, univa"),
    ],
)
def test_bad_options_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    assert message in refused(capsys, "train", "--data", data, "--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--colour", "red"], ["--epochs", "many"]],
    ids=lambda value: value[0],
)
def test_options_that_do_not_parse_exit_with_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert mmer_fast("train", "--data", data, "--out", tmp_path / "run", *arguments) == 2
    assert arguments[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_output_path_that_cannot_be_written_is_refused(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        assert str(out) in refused(capsys, "train", "--data", data, "--out", out)
    assert file.read_text() == "mine"
    for out in (tmp_path / "p.xlsx", tmp_path / "absent" / "p.csv"):
        assert "--out" in refused(capsys, "predict", "--run", run, "--data", data, "--out", out)


def test_evaluation_needs_a_model_and_fitting_data(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "model.safetensors" in refused(capsys, "evaluate", "--run", tmp_path, "--data", data)
    narrow = load(data)
    for split in narrow.splits.values():
        split.features["video"] = split.features["video"][..., :30].copy()
    narrow.modalities["video"] = 30
    write_npz(narrow, tmp_path / "narrow.npz")
    assert "feature sizes" in refused(capsys, "evaluate", "--run", run, "--data", tmp_path / "narrow.npz")
    renamed = load(data)
    renamed.label_names[0] = "joy"
    write_npz(renamed, tmp_path / "renamed.npz")
    assert "labels" in refused(capsys, "evaluate", "--run", run, "--data", tmp_path / "renamed.npz")
    other = make_synthetic(1, n_train=2, n_valid=2, n_test=2, max_length=8).select(["text"])
    write_npz(other, tmp_path / "text.npz")
    for command in (["evaluate"], ["explain", "--sample", 0], ["predict", "--out", tmp_path / "p.csv"]):
        message = refused(capsys, *command, "--run", run, "--data", tmp_path / "text.npz")
        assert "expected at least one of the modalities audio, video that the model was trained on; got text" in message


def test_a_modality_name_that_no_module_can_have_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dotted = load(data).select(["audio"])
    for split in dotted.splits.values():
        split.features["a.b"], split.lengths["a.b"] = split.features.pop("audio"), split.lengths.pop("audio")
    dotted.modalities = {"a.b": 74}
    write_npz(dotted, tmp_path / "dotted.npz")
    message = refused(capsys, "train", "--data", tmp_path / "dotted.npz", "--out", tmp_path / "run")
    assert "'a.b'" in message
    assert not (tmp_path / "run").exists()


def test_diverging_training_exits_with_1(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--lr",
        1e30,
        "--batch-size",
        8,
        "--device",
        "cpu",
    )
    assert "not finite" in refused(capsys, "train", *arguments, code=1)


def test_an_interrupted_training_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FastStep, "accumulate_gradients", interrupted)
    arguments = ("--data", data, "--out", tmp_path / "run", "--device", "cpu")
    assert mmer_fast("train", *arguments) == 130
    assert f"mmer-fast train --out {tmp_path / 'run'} --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert mmer_fast("train", *arguments, "--resume") == 0


def test_a_terminated_training_saves_its_state_and_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = FastStep.accumulate_gradients

    def warned(*given: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*given, **options)

    monkeypatch.setattr(FastStep, "accumulate_gradients", warned)
    out = tmp_path / "run"
    arguments = ("--data", data, "--out", out, "--epochs", 1, "--device", "cpu", "--batch-size", 8, "--workers", 1)
    assert mmer_fast("train", *arguments) == 143
    assert capsys.readouterr().err == (f"terminated by SIGTERM; go on with: mmer-fast train --out {out} --resume\n")
    assert steps_done(out / "state.safetensors") == 1
    assert "stopped: terminated by SIGTERM" in (out / "train.log").read_text()
    assert json.loads((out / "config.json").read_text())["train"]["workers"] == 1


def test_missing_packages_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "TRAIN_PACKAGES", {"torch": "torch", "a_package_that_is_absent": "absent-package"})
    message = refused(capsys, "train", "--out", "somewhere")
    assert "needs absent-package: " in message
    assert "pip install 'mmer_fast[train]'" in message


def test_help_describes_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert mmer_fast("--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("train", "evaluate", "predict"))
    assert mmer_fast("train", "--help") == 0
    out = capsys.readouterr().out
    options = (
        "data",
        "out",
        "preset",
        "epochs",
        "batch-size",
        "lr",
        "seed",
        "device",
        "modalities",
        "resume",
    )
    assert all(f"--{option}" in out for option in options)

"""The commands and the Python interface: train, report, explain, predict, TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import mmer_fast, refused
from small_runs import Page, small_run

from mmer_fast import training
from mmer_fast.data import MultiModalData, load, make_synthetic, write_npz
from mmer_fast.training import Run, observers
from mmer_fast.training.checkpoint import CheckpointError
from mmer_fast.training.predictions import Predictions
from mmer_fast.training.run import RunError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.npz"
    small = make_synthetic(1, n_train=20, n_valid=8, n_test=10, max_length=8).select(["audio", "video"])
    small.splits["valid"].extras["id"] = np.array([f"clip[{i}]" for i in range(8)])
    write_npz(small, path)
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_run(data, tmp_path_factory.mktemp("runs") / "run")


def test_report_reads_the_data_that_the_run_names(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert mmer_fast("report", run.directory, "--out", out, "--device", "cpu", "--no-timing") == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert "Every label" in Page(out.read_text(encoding="utf-8")).text
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_report_refuses_what_it_cannot_do(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert "config.json" in refused(capsys, "report", tmp_path, "--out", out)
    assert ".html" in refused(capsys, "report", run.directory, "--out", tmp_path / "page.pdf")
    assert "cannot write" in refused(capsys, "report", run.directory, "--out", tmp_path / "absent" / "page.html")
    assert "different runs" in refused(capsys, "report", run.directory, run.directory, "--out", out)
    assert "absent.npz" in refused(capsys, "report", run.directory, "--out", out, "--data", tmp_path / "absent.npz")
    assert list(tmp_path.iterdir()) == []


def test_explain_shows_a_sample(run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sample.html"
    arguments = ("explain", "--run", run.directory, "--data", data, "--device", "cpu")
    assert mmer_fast(*arguments, "--sample", 4, "--out", out) == 0
    text = capsys.readouterr().out
    explanation = run.explain(4, data)
    assert "sample 4 of test" in text
    for name, p in zip(explanation.labels, explanation.probabilities, strict=True):
        assert name in text
        assert f"{p:.3f}" in text
    for name, units in explanation.modalities.items():
        assert f"{name}: {units.length} units, ATM masks {units.count:.1f}" in text
    page = Page(out.read_text(encoding="utf-8"))
    assert "Sample 4 of test" in page.text
    assert sum(1 for _ in page.classes("bar")) == len(explanation.labels)
    assert mmer_fast(*arguments, "--sample", "clip[2]", "--split", "valid") == 0
    assert "sample 2 of valid: clip[2]" in capsys.readouterr().out


def test_a_run_is_named_by_its_directory_or_its_checkpoint(
    run: Run, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for option in (("--run", run.directory), ("--checkpoint", run.directory / "model.safetensors")):
        assert mmer_fast("explain", *option, "--data", data, "--device", "cpu", "--sample", "4") == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""
    assert mmer_fast("explain", "--checkpoint", data, "--data", data, "--sample", "4") != 0


@pytest.mark.parametrize("sample", ["10", "-1", "clip[2]", "<b>"])
def test_explain_refuses_an_unknown_sample(
    run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sample: str
) -> None:
    out = tmp_path / "sample.html"
    arguments = ("explain", "--run", run.directory, "--data", data, f"--sample={sample}", "--out", out)
    message = refused(capsys, *arguments)
    assert "expected an index from 0 to 9 of the test split" in message
    assert sample in message
    assert not out.exists()


def test_predictions_survive_json_lines(run: Run, data: Path, tmp_path: Path) -> None:
    for name in ("p.jsonl", "p.npz", "p.csv"):
        arguments = ("--data", data, "--out", tmp_path / name, "--split", "valid")
        assert mmer_fast("predict", "--run", run.directory, *arguments) == 0
    lines = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    expected = run.predict(data, "valid")
    assert [record["sample"] for record in records] == list(range(8))
    assert [record["id"] for record in records] == [f"clip[{i}]" for i in range(8)] == expected.ids
    read = np.array([list(record["probabilities"].values()) for record in records], dtype=np.float32)
    np.testing.assert_array_equal(read, expected.probabilities)  # to the last bit
    for i, record in enumerate(records):
        assert list(record["probabilities"]) == list(expected.label_names)
        assert record["predicted"] == expected.predicted(i)
    with np.load(tmp_path / "p.npz") as stored:
        np.testing.assert_array_equal(stored["probabilities"], expected.probabilities)
        assert stored["ids"].tolist() == expected.ids
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        assert [row["id"] for row in csv.DictReader(file)] == expected.ids


def test_names_survive_json_lines(tmp_path: Path) -> None:
    names = ['a "quoted"\n', "é\u2028", "</script>"]
    predictions = Predictions(np.array([[0.1, 0.5, 0.7]], np.float32), names, 0.5)
    predictions.write(str(tmp_path / "p.jsonl"))
    text = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 1
    record = json.loads(text)
    assert list(record["probabilities"]) == names
    assert record["predicted"] == ["</script>"]
    assert "id" not in record
    predictions.write(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["sample", *names, "predicted"]
    with pytest.raises(RunError, match=r"\.csv, \.npz or \.jsonl"):
        predictions.write(tmp_path / "p.txt")


def test_python_refuses_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RunError, match="device must be auto, cpu, cuda or cuda:<number>, got 'gpu'"):
        training.train(data, out, device="gpu")
    with pytest.raises(RunError, match=r"device cuda:99: this machine has \d+ CUDA device"):
        training.train(data, out, device="cuda:99")
    with pytest.raises(TypeError, match=r"data must be a MultiModalData, a path .*got dict"):
        training.train({"train_audio": np.zeros((2, 3, 4))}, out)  # type: ignore[arg-type]
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(RunError, match="cannot write there: File exists"):
        training.train(data, out, device="cpu", show=False)


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    absent = Run(tmp_path / "absent", "cpu")
    for ask in (lambda: absent.config, lambda: absent.metrics, lambda: absent.model):
        with pytest.raises(CheckpointError, match=r"absent/.*: no such file; the directory of a finished"):
            ask()


def test_a_csv_has_no_two_columns_of_one_name(tmp_path: Path) -> None:
    probabilities = np.array([[0.1, 0.5, 0.7]], np.float32)
    without_ids = Predictions(probabilities, ["id", "sad", "happy"], 0.5)
    without_ids.write(tmp_path / "p.csv")
    for labels in (["id", "sad", "predicted"], ["sample", "sad", "id"]):
        predictions = Predictions(probabilities, labels, 0.5, ["clip"])
        with pytest.raises(
            RunError, match=rf"called {', '.join(x for x in ('sample', 'id', 'predicted') if x in labels)}, "
        ):
            predictions.write(tmp_path / "q.csv")
        predictions.write(tmp_path / "q.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "q.jsonl"]


def test_names_that_are_no_text_are_written(run: Run, data: Path, tmp_path: Path) -> None:
    """As `os.listdir` gives names of files that are not UTF-8."""
    odd = load(data)
    odd.splits["test"].extras["id"] = np.array([f"caf\udce9{i}" for i in range(10)])
    odd.label_names[0] = "caf\udce9"
    fresh = small_run(odd, tmp_path / "run")
    assert r"caf\udce9" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    predictions = fresh.predict(odd)
    predictions.write(tmp_path / "p.jsonl")
    first = json.loads((tmp_path / "p.jsonl").read_text(encoding="utf-8").partition("\n")[0])
    assert (first["id"], next(iter(first["probabilities"]))) == ("caf\udce90", "caf\udce9")
    predictions.write(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["id"] == r"caf\udce90"


def test_a_terminal_without_the_characters_is_no_error(run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert mmer_fast("explain", "--run", run.directory, "--data", data, "--sample", 0) == 0
    stream.flush()
    assert rb"\u2588" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_missing_tensorboard_is_named_before_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        observers.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    arguments = ("--data", data, "--out", tmp_path / "run", "--device", "cpu", "--tensorboard")
    assert "pip install tensorboard" in refused(capsys, "train", *arguments)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_number(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = small_run(data, tmp_path / "run", tensorboard=True, log_every=2)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("step/recognition")]
    assert steps == [0, 2, 3, 5]  # three steps an epoch
    logged = [event.value for event in events.Scalars("valid/micro_f1")]
    assert (tmp_path / "run" / "report.html").exists()
    assert logged == pytest.approx([record["valid"]["micro_f1"] for record in run.metrics["history"]])


def test_five_lines_of_python(data: Path, tmp_path: Path) -> None:
    run = training.train(data, tmp_path / "run", preset="compact", device="cpu", show=False, epochs=1, dim=16, heads=2)
    assert run.metrics["test"] == run.evaluate(data) == run.evaluate()
    assert len(run.predict(split="train")) == 20
    with pytest.raises(RunError, match="split: expected one of train, valid, test; got 'dev'"):
        run.predict(split="dev")
    assert set(run.explain(0).modalities) == {"audio", "video"}
    assert run.report(tmp_path / "page.html") == tmp_path / "page.html"
    with pytest.raises(ValueError, match=r"out must end in \.html, got .*page\.pdf"):
        run.report(tmp_path / "page.pdf")

    again = Run(tmp_path / "run", "cpu")
    np.testing.assert_array_equal(again.predict().probabilities, run.predict().probabilities)
    assert again.config.model.dim == 16
    assert again.config.data["source"] == str(data)
    assert repr(again) == f"Run({str(tmp_path / 'run')!r})"


def test_python_trains_on_data_in_memory_and_resumes(tmp_path: Path) -> None:
    data: MultiModalData = make_synthetic(1, n_train=10, n_valid=4, n_test=4, max_length=8)
    run = small_run(data, tmp_path / "run", epochs=1, modalities=["video"])
    assert run.config.data["modalities"] == {"video": 35}
    with pytest.raises(RunError, match="already holds a run"):
        small_run(data, tmp_path / "run")
    with pytest.raises(RunError, match="no run to resume"):
        small_run(data, tmp_path / "other", resume=True)
    with pytest.raises(RunError, match=r"train\.epochs"):
        small_run(data, tmp_path / "run", resume=True, modalities=["video"], epochs=2)
    with pytest.raises(RunError, match=r"unknown setting.*colour"):
        small_run(data, tmp_path / "other", colour="red")
    with pytest.raises(RunError, match=r"TrainConfig\.epochs"):
        small_run(data, tmp_path / "other", epochs=0)
    with pytest.raises(RunError, match="preset must be"):
        small_run(data, tmp_path / "other", preset="large")
    before = run.metrics
    again = small_run(data, tmp_path / "run", resume=True, modalities=["video"], epochs=1)
    assert again.metrics == before
    assert not (tmp_path / "other").exists()
    wrong = load("synthetic").select(["audio"])
    with pytest.raises(Exception, match="video"):
        run.evaluate(wrong)

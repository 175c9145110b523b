"""The best model of a run says which epoch it is of, after a resumption too; files that do not say it are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import Silent, StopAt, small_data, train

import mmer_fast
from mmer_fast import cli
from mmer_fast.data import write_npz
from mmer_fast.training.checkpoint import read_tensors, write_tensors
from mmer_fast.training.files import BEST_FILE
from mmer_fast.training.origin import origin_in_words
from mmer_fast.training.run import load_best

CPU = torch.device("cpu")
STEPS = 4  # of an epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directory of a finished training, not to be written to, and its results."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, train(directory, Silent())


Whole = tuple[Path, dict[str, Any]]


def header_of(directory: Path) -> dict[str, Any]:
    return load_best(directory, CPU)[1]


def test_the_best_model_says_where_it_comes_from(whole: Whole) -> None:
    directory, results = whole
    epoch, value = results["best_epoch"], results["valid"]["micro_f1"]
    header = header_of(directory)
    assert header["system"] == "robmmr"
    assert header["training"] == {
        "epoch": epoch,
        "step": STEPS * epoch,
        "selection": "micro_f1",
        "value": value,
        "version": mmer_fast.__version__,
    }
    words = f"epoch {epoch}, step {STEPS * epoch}, validation micro_f1 {value:.4f}, mmer_fast {mmer_fast.__version__}"
    assert origin_in_words(header) == words
    assert origin_in_words({"training": {**header["training"], "value": None}}) == words.replace(f"{value:.4f}", "none")


@pytest.mark.parametrize("stop", [2, 7])
def test_after_a_resumption_it_says_the_same(tmp_path: Path, whole: Whole, stop: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", StopAt(stop))
    train(tmp_path / "run", Silent())
    assert header_of(tmp_path / "run") == header_of(whole[0])


def test_another_metric_selects_and_is_named(tmp_path: Path) -> None:
    results = train(tmp_path, Silent(), selection="accuracy")
    entry = header_of(tmp_path)["training"]
    assert (entry["selection"], entry["value"]) == ("accuracy", results["valid"]["accuracy"])


def test_an_older_file_is_read_and_silent(tmp_path: Path, whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    older = tmp_path / "older"
    shutil.copytree(whole[0], older)
    tensors, header = read_tensors(older / BEST_FILE)
    del header["training"]
    write_tensors(older / BEST_FILE, tensors, header)
    assert origin_in_words(header_of(older)) == ""
    assert train(older, Silent()) == whole[1]  # resumes, with nothing left to do
    assert "epoch" not in shown(capsys, tmp_path, "evaluate", older)
    assert shown(capsys, tmp_path, "predict", older).endswith("p.csv")


def test_evaluate_and_predict_show_it(tmp_path: Path, whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    words = origin_in_words(header_of(whole[0]))
    assert words in shown(capsys, tmp_path, "evaluate", whole[0])
    assert shown(capsys, tmp_path, "predict", whole[0]).endswith(f"p.csv; weights: {words}")


def shown(capsys: pytest.CaptureFixture[str], folder: Path, command: str, run: Path) -> str:
    """What a command prints about a run, in one line."""
    data = folder / "small.npz"
    write_npz(small_data(), data)
    more = ["--out", str(folder / "p.csv")] if command == "predict" else []
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--run", str(run), "--data", str(data), "--device", "cpu", *more])
    assert not ended.value.code
    return " ".join(capsys.readouterr().out.split())

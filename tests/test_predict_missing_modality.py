"""A run and data that lack a modality of it: the same as if each sample lacked it, and a note says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import mmer_fast

from mmer_fast.data import MultiModalData, load, make_synthetic, write_npz
from mmer_fast.systems.mmin import restricted
from mmer_fast.training import Run

SIZES = ("--set", "dim=16", "--set", "ffn_dim=16", "--set", "unimodal_blocks=1", "--set", "multimodal_blocks=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data file with audio and video."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    write_npz(make_synthetic(1, n_train=20, n_valid=8, n_test=10, max_length=8).select(["audio", "video"]), path)
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    arguments = ("--epochs", 1, "--batch-size", 8, "--device", "cpu", *SIZES)
    assert mmer_fast("train", "--data", data, "--out", out, *arguments) == 0
    return out


@pytest.fixture(scope="module")
def only_audio(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data without a modality that the model was trained on."""
    path = tmp_path_factory.mktemp("data") / "audio.npz"
    write_npz(load(data).select(["audio"]), path)
    return path


@pytest.fixture(scope="module")
def emptied(data: Path) -> MultiModalData:
    """The same samples, where the modality is there and has length 0."""
    whole = load(data)
    whole.splits = {name: restricted(split, ["audio"]) for name, split in whole.splits.items()}
    return whole.check()


def test_a_modality_that_a_file_lacks_is_missing_in_every_sample(
    run: Path, only_audio: Path, emptied: MultiModalData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = f"note: video is not in {only_audio}: treated as missing in every sample\n"
    arguments = ("--run", run, "--data", only_audio, "--device", "cpu")
    trained = Run(run, "cpu")

    assert mmer_fast("predict", *arguments, "--out", tmp_path / "p.npz") == 0
    assert capsys.readouterr().err == note
    with np.load(tmp_path / "p.npz") as stored:
        np.testing.assert_array_equal(stored["probabilities"], trained.predict(emptied).probabilities)
    assert mmer_fast("evaluate", *arguments, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == note
    assert json.loads(captured.out) == trained.evaluate(emptied)
    assert mmer_fast("explain", *arguments, "--sample", 3) == 0
    captured = capsys.readouterr()
    assert captured.err == note
    assert "video: missing in this sample" in captured.out


def test_conditions_need_every_modality(run: Path, only_audio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("evaluate", "--run", run, "--data", only_audio, "--device", "cpu", "--conditions")
    assert mmer_fast(*arguments) == 2
    assert "--conditions: expected all modalities in" in capsys.readouterr().err


def test_python_warns_of_a_modality_that_the_data_lacks(run: Path, only_audio: Path, emptied: MultiModalData) -> None:
    trained, expected = Run(run, "cpu"), f"video is not in {only_audio}: treated as missing in every sample"
    with pytest.warns(UserWarning, match=expected) as caught:
        got = trained.predict(only_audio).probabilities
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(got, trained.predict(emptied).probabilities)
    with pytest.warns(UserWarning, match=expected):
        assert trained.evaluate(load(only_audio), "valid") == trained.evaluate(emptied, "valid")
    with pytest.warns(UserWarning, match=expected):
        explained = trained.explain(3, only_audio)
    np.testing.assert_array_equal(explained.probabilities, trained.explain(3, emptied).probabilities)
    assert explained.modalities["video"].length == 0
    with pytest.warns(UserWarning, match=expected):
        loaded = trained.load(only_audio)
    assert list(loaded.modalities) == ["audio", "video"]
    assert loaded.notes[-1] == expected
    assert loaded.check() is loaded

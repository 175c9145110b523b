"""predict and explain on files that hold one split without labels; what needs labels says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import mmer_fast, refused
from unlabelled import strip

from mmer_fast.data import FORMATS, DataError, MissingPart, MultiModalData, Split, load, make_synthetic, no_labels
from mmer_fast.data.needs import for_prediction
from mmer_fast.training import Run
from mmer_fast.training.evaluate import evaluate
from mmer_fast.training.run import RunError

SIZES = ("--set", "dim=16", "--set", "ffn_dim=16", "--set", "unimodal_blocks=1", "--set", "multimodal_blocks=1")


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return make_synthetic(1, n_train=20, n_valid=8, n_test=10, max_length=8)


@pytest.fixture(scope="module")
def whole(data: MultiModalData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All splits with labels."""
    path = tmp_path_factory.mktemp("data") / "whole.npz"
    FORMATS["npz"].write(data, path)
    return path


@pytest.fixture(scope="module")
def bare(data: MultiModalData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test split without labels."""
    path = tmp_path_factory.mktemp("data") / "bare.npz"
    FORMATS["npz"].write(data, path)
    strip("npz", path, ["test"])
    return path


@pytest.fixture(scope="module")
def run(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "finished"
    arguments = ("--epochs", 1, "--batch-size", 8, "--device", "cpu", *SIZES)
    assert mmer_fast("train", "--data", whole, "--out", out, *arguments) == 0
    return Run(out, "cpu")


@pytest.mark.parametrize("name", FORMATS)
def test_probabilities_are_those_of_the_file_with_labels(
    name: str, run: Run, data: MultiModalData, tmp_path: Path
) -> None:
    path = tmp_path / f"d{FORMATS[name].suffix}"
    FORMATS[name].write(data, path)
    expected = run.predict(path).probabilities
    strip(name, path, ["test"])
    np.testing.assert_array_equal(run.predict(path).probabilities, expected)
    arguments = ("--run", run.directory, "--data", path, "--device", "cpu", "--out", tmp_path / "p.npz")
    assert mmer_fast("predict", *arguments) == 0
    with np.load(tmp_path / "p.npz") as stored:
        np.testing.assert_array_equal(stored["probabilities"], expected)
        assert stored["label_names"].tolist() == data.label_names


def test_another_split(run: Run, whole: Path, data: MultiModalData, tmp_path: Path) -> None:
    path = tmp_path / "valid.safetensors"
    FORMATS["safetensors"].write(data, path)
    strip("safetensors", path, ["valid"])
    np.testing.assert_array_equal(run.predict(path, "valid").probabilities, run.predict(whole, "valid").probabilities)
    with pytest.raises(MissingPart, match=r"no keys for split test; expected test_\{modality\}; got the splits valid"):
        run.predict(path)
    with pytest.raises(RunError, match="split: expected one of train, valid, test; got 'tests'"):
        run.predict(path, "tests")


def test_data_in_memory(run: Run, data: MultiModalData, whole: Path) -> None:
    test = data.splits["test"]
    split = Split(test.features, test.lengths, no_labels(len(test)), test.extras)
    alone = MultiModalData({"test": split}, [], data.modalities, "made for a test")
    np.testing.assert_array_equal(run.predict(alone).probabilities, run.predict(whole).probabilities)
    assert run.explain(3, alone).truth is None
    with pytest.raises(MissingPart, match=r"splits: expected train, valid, test; got test \(evaluation needs"):
        run.evaluate(alone)
    with pytest.raises(MissingPart, match="evaluation needs a split with labels"):
        evaluate(run.model, split)
    with pytest.raises(DataError, match="splits: expected train, valid, test; got test"):
        run.report(data=alone)
    mixed = MultiModalData({**data.splits, "test": split}, data.label_names, data.modalities, "made for a test")
    with pytest.raises(MissingPart, match=r"test labels: .* not known \(evaluation needs"):
        run.evaluate(mixed, "valid")


def test_a_modality_may_be_missing_too(run: Run, whole: Path, data: MultiModalData, tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    FORMATS["npz"].write(data.select(["text", "audio"]), path)
    strip("npz", path, ["test"])
    with pytest.warns(UserWarning, match="video is not in .*: treated as missing in every sample") as caught:
        got = run.predict(path).probabilities
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="video is not in") as caught:
        loaded = run.load(path, for_prediction("test"))
    assert caught[0].filename == __file__
    assert (list(loaded.splits), loaded.splits["test"].lengths["video"].any()) == (["test"], False)
    with pytest.warns(UserWarning, match="video is not in"):
        np.testing.assert_array_equal(got, run.predict(load(whole).select(["text", "audio"])).probabilities)


def test_explain_shows_the_truth_only_where_it_is_known(
    run: Run, whole: Path, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, unknown = run.explain(4, whole), run.explain(4, bare)
    assert known.truth is not None
    assert unknown.truth is None
    assert list(unknown.labels) == list(known.labels)
    np.testing.assert_array_equal(unknown.probabilities, known.probabilities)
    np.testing.assert_array_equal(unknown.without_masked, known.without_masked)
    shown, pages = [], []
    for path in (whole, bare):
        out = tmp_path / f"{path.stem}.html"
        arguments = ("--run", run.directory, "--data", path, "--device", "cpu", "--sample", 4, "--out", out)
        capsys.readouterr()
        assert mmer_fast("explain", *arguments) == 0
        shown.append(capsys.readouterr().out)
        pages.append(out.read_text(encoding="utf-8"))
    assert [" true " in text for text in shown] == [True, False]
    assert all(f"{p:.3f}" in shown[1] for p in unknown.probabilities)
    assert ["The true labels are not known." in page for page in pages] == [False, True]
    assert "in the data" not in pages[1]


def test_explain_holds_labels_that_are_there_to_those_of_the_run(
    run: Run, data: MultiModalData, tmp_path: Path
) -> None:
    path = tmp_path / "d.npz"
    FORMATS["npz"].write(data, path)
    strip("npz", path, ["test"], [])
    assert run.explain(4, path).truth is not None
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files}
    np.savez(path, **(arrays | {"label_names": np.array(list("abcdef"))}))
    with pytest.raises(RunError, match="expected the labels"):
        run.explain(4, path)
    assert len(run.predict(path)) == 10


def test_what_needs_labels_says_so(
    run: Run, whole: Path, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "evaluate", "--run", run.directory, "--data", bare)
    assert f"{bare}: no keys for split train; expected train_labels and train_{{modality}} (evaluation needs" in message
    assert "with labels; predict and explain take one split without)" in message
    with np.load(whole) as stored:
        np.savez(tmp_path / "some.npz", **{key: stored[key] for key in stored.files if key != "test_labels"})
    message = refused(capsys, "evaluate", "--run", run.directory, "--data", tmp_path / "some.npz", "--split", "valid")
    assert "missing key test_labels (evaluation needs" in message
    out = tmp_path / "out"
    for command in (("train",), ("ablate", "--suite", "table2"), ("compare", "--models", "br")):
        message = refused(capsys, *command, "--data", tmp_path / "some.npz", "--out", out)
        assert message.endswith("some.npz: missing key test_labels\n")
    message = refused(capsys, "report", run.directory, "--data", bare, "--out", tmp_path / "report.html")
    assert "no keys for split train; expected train_labels" in message
    assert not out.exists()


def test_features_are_checked_as_ever(run: Run, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(bare) as stored:
        arrays = {key: stored[key] for key in stored.files}
    text, lengths = arrays["test_text"], arrays["test_text_lengths"]
    changes = {
        "feature sizes": {"test_text": text[..., :30]},
        "test text: expected finite values": {"test_text": np.full_like(text, np.nan)},
        "expected 3 samples, as many as key test_text; got 10": {
            "test_text": text[:3],
            "test_text_lengths": lengths[:3],
        },
        "key test_text_lengths: expected values in": {"test_text_lengths": lengths + 100},
    }
    for expected, changed in changes.items():
        np.savez(tmp_path / "d.npz", **(arrays | changed))
        arguments = ("--run", run.directory, "--data", tmp_path / "d.npz", "--out", tmp_path / "p.csv")
        assert expected in refused(capsys, "predict", *arguments)
    assert not (tmp_path / "p.csv").exists()


def test_identifiers_are_kept(run: Run, bare: Path, tmp_path: Path) -> None:
    with np.load(bare) as stored:
        arrays = {key: stored[key] for key in stored.files}
    np.savez(tmp_path / "d.npz", **arrays, test_extras_id=np.array([f"clip {i}" for i in range(10)]))
    run.predict(tmp_path / "d.npz").write(tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [f"clip {i}" for i in range(10)]

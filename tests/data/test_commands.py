"""mmer-fast convert, inspect and make-data: what they write and say, and their exit codes."""

from __future__ import annotations

import json
import os
import pickle
import resource

import numpy as np
import pytest

from mmer_fast import cli
from mmer_fast.data import FORMATS, load, make_synthetic, write_npz
from mmer_fast.training.commands import app

SMALL = ("--train", 12, "--valid", 4, "--test", 5, "--max-length", 8)
FOLDERS = [name for name, format in FORMATS.items() if not format.suffix]


def run(*arguments: object) -> int:
    """Run a command line in this process; its exit code."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def refused(capsys, *arguments: object) -> str:
    """Run a command line that must fail with one line on stderr; that line."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmer-fast: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", FORMATS)
def test_make_inspect_convert(name, tmp_path, capsys):
    made, out = tmp_path / f"made{FORMATS[name].suffix}", tmp_path / "out.npz"
    assert run("make-data", made, "--format", name, "--seed", 3, *SMALL) == 0
    assert FORMATS[name].title in capsys.readouterr().out
    assert run("inspect", made, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["format"], summary["problem"]) == (name, None)
    assert summary["modalities"] == {"text": 300, "video": 35, "audio": 74}
    assert sum(split["samples"] for split in summary["splits"].values()) == 21
    assert run("convert", made, out) == 0
    assert f"read as {name}; " in capsys.readouterr().out
    direct, converted = load(made), load(out)
    for split, expected in direct.splits.items():
        for modality in direct.modalities:
            assert np.array_equal(converted.splits[split].features[modality], expected.features[modality])
            assert np.array_equal(converted.splits[split].lengths[modality], expected.lengths[modality])
        assert np.array_equal(converted.splits[split].labels, expected.labels)
    assert converted.label_names == direct.label_names
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([made.name, "out.npz"])


def test_the_synthetic_data_are_those_of_training(tmp_path):
    chosen = ("--signal", 0.5, "--units", 4)
    assert run("make-data", tmp_path / "d.npz", "--seed", 5, *chosen, *SMALL) == 0
    expected = make_synthetic(5, signal=0.5, most_units=4, n_train=12, n_valid=4, n_test=5, max_length=8)
    back = load(tmp_path / "d.npz")
    assert np.array_equal(back.splits["test"].features["text"], expected.splits["test"].features["text"])
    assert np.array_equal(back.splits["test"].extras["shift"], expected.splits["test"].extras["shift"])


def test_inspect_shows_a_table(emotional, tmp_path, capsys):
    write_npz(emotional, tmp_path / "d.npz")
    assert run("inspect", tmp_path / "d.npz") == 0
    out = capsys.readouterr().out
    for text in ("7, 6, 5", "1 / ", "/ 6", "happy", "none of them", "missing", "%"):
        assert text in out
    summary = _summary(tmp_path / "d.npz", capsys)
    text = summary["splits"]["train"]["modalities"]["text"]
    lengths = emotional.splits["train"].lengths["text"]
    assert text["missing"] == 1
    assert text["lengths"] == {
        "min": lengths[lengths > 0].min(),
        "median": np.median(lengths[lengths > 0]),
        "max": 6,
    }
    assert text["padding"] == pytest.approx(1 - lengths.mean() / 6)
    labels = emotional.splits["train"].labels
    assert list(summary["splits"]["train"]["prevalence"].values()) == pytest.approx(labels.mean(axis=0))
    assert summary["splits"]["train"]["without_label"] == pytest.approx(1 - labels.any(axis=1).mean())


def _summary(path, capsys, code=0):
    capsys.readouterr()
    assert run("inspect", path, "--json") == code
    return json.loads(capsys.readouterr().out)


def test_values_that_are_not_finite(emotional, tmp_path, capsys):
    FORMATS["mult"].write(emotional, tmp_path / "d.pkl")
    content = pickle.loads((tmp_path / "d.pkl").read_bytes())
    content["train"]["vision"][0, 1, 2] = np.nan
    content["valid"]["text"][0, 0, 0] = np.inf
    content["valid"]["audio"][0, 0, 0] = -np.inf
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(content))
    summary = _summary(tmp_path / "d.pkl", capsys, code=2)
    assert "train video: expected finite values" in summary["problem"]
    assert summary["splits"]["train"]["modalities"]["video"]["not_finite"] == 1
    assert summary["splits"]["valid"]["modalities"]["audio"]["not_finite"] == 0
    assert "train video: expected finite" in refused(capsys, "convert", tmp_path / "d.pkl", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()
    assert run("convert", tmp_path / "d.pkl", tmp_path / "out.npz", "--replace-nonfinite") == 0
    out = capsys.readouterr().out
    assert "note: video: 1 values that were not finite replaced by 0" in out
    assert "note: audio: -inf replaced by 0" in out
    back = load(tmp_path / "out.npz")
    assert back.splits["train"].features["video"][0, 1, 2] == 0
    assert back.splits["valid"].features["text"][0, 0, 0] == 0


def test_convert_to_safetensors_and_smaller(emotional, tmp_path):
    FORMATS["mmsa"].write(emotional, tmp_path / "d.pkl")
    assert run("convert", tmp_path / "d.pkl", tmp_path / "d.safetensors", "--format", "mmsa") == 0
    assert load(tmp_path / "d.safetensors").label_names == ["negative", "neutral", "positive"]
    assert run("convert", tmp_path / "d.pkl", tmp_path / "large.npz") == 0
    assert run("convert", tmp_path / "d.pkl", tmp_path / "small.npz", "--compress") == 0
    assert (tmp_path / "small.npz").stat().st_size < (tmp_path / "large.npz").stat().st_size


def test_the_embedded_data_set_is_a_source_too(emotional, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmer_fast.data.loading.make_synthetic", lambda seed: emotional)
    assert _summary("synthetic", capsys)["format"] == "synthetic"
    assert run("convert", "synthetic", tmp_path / "d.npz") == 0
    assert load(tmp_path / "d.npz").modalities == emotional.modalities


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "d.npz", "out.csv"), "OUT must end in .npz or .safetensors, got out.csv"),
        (("convert", "absent.pkl", "out.npz"), "absent.pkl: no such file"),
        (("convert", "d.npz", "absent/out.npz"), "absent/out.npz: cannot be written (No such file or directory)"),
        (("convert", "d.npz", "out.npz", "--format", "csv"), "format: expected one of npz, safetensors"),
        (("convert", "d.npz", "out.npz", "--format", "mmsa"), "d.npz: "),
        (("inspect", "text.npz"), "text.npz: not a readable .npz file"),
        (("inspect", "empty"), "empty: expected a file, or a folder of UniVA"),
        (("make-data", "out"), "--format: say which of npz, "),
        (("make-data", "out.pkl"), "--format: say which of mmsa, mult, mmgcn to write to out.pkl"),
        (("make-data", "out.npz", "--format", "mmsa"), "OUT must end in .pkl for the format mmsa"),
        (("make-data", "out.npz", "--train", 0), "n_train: expected at least 1; got 0"),
        (("make-data", "full", "--format", "csd", *SMALL), "full: exists already"),
    ],
)
def test_what_cannot_be_done_is_said(emotional, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_npz(emotional, "d.npz")
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(capsys, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_malicious_file_is_refused_and_not_run(tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    (tmp_path / "d.pkl").write_bytes(pickle.dumps({"train": Hostile()}))
    for command in (("inspect",), ("convert",), ("train", "--data")):
        out = {"convert": (tmp_path / "o.npz",), "train": ("--out", tmp_path / "run")}.get(command[0], ())
        assert "asks for posix.system" in refused(capsys, *command, tmp_path / "d.pkl", *out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.pkl"]


@pytest.mark.parametrize("name", ["npz", "safetensors", "tailor", "mmsa", "csd"])
def test_a_full_disk_is_said_and_leaves_nothing(name, tmp_path, capsys):
    out = tmp_path / f"d{FORMATS[name].suffix}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        message = refused(capsys, "make-data", out, "--format", name, *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written (" in message
    assert list(tmp_path.iterdir()) == []


def test_help_describes_the_commands(capsys):
    assert {command.name or command.callback.__name__ for command in app.registered_commands} >= {
        "train",
        "convert",
        "inspect",
        "make-data",
    }
    assert run("make-data", "--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in FORMATS)
    assert all(f"--{option}" in out for option in ("format", "seed", "train", "valid", "test", "max-length"))


def test_training_takes_the_same_sources(tmp_path, capsys):
    assert run("make-data", tmp_path / "csd", "--format", "csd", *SMALL) == 0
    arguments = ("--data", tmp_path / "csd", "--out", tmp_path / "run", "--modalities", "smell")
    assert "'smell' not in" in (message := refused(capsys, "train", *arguments))
    assert "available: text, video, audio" in message  # so it was read

"""What holds for every format: it is found out, it keeps what it can hold, it is written whole or not at all."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from mmer_fast.data import FORMATS, DataError, hdf5, load
from mmer_fast.data.loading import read_unchecked
from mmer_fast.data.writing import sentiment_of

NUMBERED = [f"label_{k}" for k in range(6)]
LABEL_NAMES = {"univa": NUMBERED, "mmin": NUMBERED, "mmsa": ["negative", "neutral", "positive"]}
KEEPS_SEQUENCES = [name for name in FORMATS if name != "mmgcn"]


def _write(name, data, tmp_path):
    path = tmp_path / f"d{FORMATS[name].suffix}"
    FORMATS[name].write(data, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    return path


@pytest.mark.parametrize("name", KEEPS_SEQUENCES)
def test_round_trip(name, emotional, tmp_path):
    path = _write(name, emotional, tmp_path)
    assert read_unchecked(path)[0].name == name
    back = load(path)
    assert back.modalities == emotional.modalities
    assert back.label_names == LABEL_NAMES.get(name, emotional.label_names)
    for split, expected in emotional.splits.items():
        for modality in emotional.modalities:
            assert np.array_equal(back.splits[split].lengths[modality], expected.lengths[modality])
            assert np.array_equal(back.splits[split].features[modality], expected.features[modality])
        labels = expected.labels
        if name == "mmsa":
            sentiment = sentiment_of(labels)
            labels = np.stack([sentiment < 0, sentiment == 0, sentiment > 0], axis=1)
            assert np.array_equal(back.splits[split].extras["sentiment"], sentiment)
        assert np.array_equal(back.splits[split].labels, labels)


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_format_is_taken_at_its_word(name, emotional, tmp_path):
    path = _write(name, emotional, tmp_path)
    assert load(path, format=name).modalities == emotional.modalities
    with pytest.raises(DataError, match=r"format: expected one of npz, .*; got 'parquet'"):
        load(path, format="parquet")


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_leaves_nothing(name, emotional, tmp_path):
    data = emotional
    path = tmp_path / f"d{FORMATS[name].suffix}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))  # no file may grow beyond
    try:
        with pytest.raises((OSError, RuntimeError)):
            FORMATS[name].write(data, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["univa", "csd", "mmin"])
def test_an_existing_folder_is_not_touched(name, emotional, tmp_path):
    (tmp_path / "d").mkdir()
    FORMATS[name].write(emotional, tmp_path / "d")  # an empty one will do
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="exists already"):
        FORMATS[name].write(emotional, tmp_path / "d")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["csd", "mmin"])
def test_without_h5py_the_error_says_how_to_get_it(name, emotional, tmp_path, monkeypatch):
    path = _write(name, emotional, tmp_path)
    monkeypatch.setattr(hdf5.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"needs the package h5py: pip install 'mmer_fast\[train\]'"):
        load(path)


@pytest.mark.parametrize("name", ["mmsa", "mult", "univa", "mmin", "mmgcn"])
def test_writing_what_a_format_cannot_hold_is_refused(name, emotional, make_small, tmp_path):
    for data in (make_small(), emotional.select(["text"])):
        with pytest.raises(DataError, match="holds the modalities text, video, audio; got text"):
            FORMATS[name].write(data, tmp_path / f"d{FORMATS[name].suffix}")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_folder_is_described(tmp_path):
    with pytest.raises(DataError, match=r"expected a file, or a folder of UniVA's .*\.csd.*MMIN.*nothing in it"):
        load(tmp_path)
    (tmp_path / "features.txt").touch()
    with pytest.raises(DataError, match=r"got a directory with features\.txt"):
        load(tmp_path)


def test_a_file_that_may_not_be_read(emotional, tmp_path, monkeypatch):
    path = _write("mmsa", emotional, tmp_path)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(DataError, match=r"d\.pkl: cannot be read \(Permission denied\)"):
        load(path)


def test_a_file_beyond_memory(emotional, tmp_path, monkeypatch):
    path = _write("mmgcn", emotional, tmp_path)

    def too_large(source):
        raise MemoryError

    monkeypatch.setitem(
        FORMATS, "mmgcn", FORMATS["mmgcn"].__class__(**{**FORMATS["mmgcn"].__dict__, "read": too_large})
    )
    with pytest.raises(DataError, match="does not fit into memory"):
        load(path)

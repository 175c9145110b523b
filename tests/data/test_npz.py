from __future__ import annotations

import numpy as np
import pytest

from mmer_fast.data import DataError, SequenceDataset, collate, load, npz, read_npz, write_npz


def _arrays() -> dict[str, np.ndarray]:
    """The arrays of a valid file: two modalities, no lengths, no names."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 4), ("valid", 2), ("test", 3)):
        arrays[f"{split}_text"] = rng.standard_normal((n, 5, 3)).astype(np.float32)
        arrays[f"{split}_audio"] = rng.standard_normal((n, 4, 2)).astype(np.float32)
        arrays[f"{split}_labels"] = rng.integers(0, 2, size=(n, 2), dtype=np.uint8)
    return arrays


def _save(path, arrays):
    np.savez(path, **arrays)
    return path


def test_round_trip(make_small, tmp_path):
    data = make_small()
    data.splits["test"].extras["shift"] = np.array([0, 1, 2, 0], np.uint8)
    write_npz(data, tmp_path / "d.npz")
    again = load(tmp_path / "d.npz")
    assert (again.modalities, again.label_names, again.notes) == (data.modalities, data.label_names, [])
    assert list(again.modalities) == list(data.modalities)
    for name, split in data.splits.items():
        other = again.splits[name]
        assert np.array_equal(other.labels, split.labels)
        for modality in data.modalities:
            assert np.array_equal(other.features[modality], split.features[modality])
            assert np.array_equal(other.lengths[modality], split.lengths[modality])
    assert np.array_equal(again.splits["test"].extras["shift"], [0, 1, 2, 0])
    assert [p.name for p in tmp_path.iterdir()] == ["d.npz"]


def test_a_failed_write_leaves_the_old_file_and_no_other(make_small, tmp_path, monkeypatch):
    path = tmp_path / "d.npz"
    path.write_bytes(b"old")

    def fail(file, array, **kwargs):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="disk full"):
        write_npz(make_small(), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["d.npz"]


def test_write_refuses_another_suffix(make_small, tmp_path):
    with pytest.raises(DataError, match=r"expected suffix .npz; got '.zip'"):
        write_npz(make_small(), tmp_path / "d.zip")


def test_lengths_and_label_names_are_derived_when_absent(tmp_path):
    arrays = _arrays()
    arrays["train_text"][0, 3:] = 0
    arrays["train_text"][1, :2] = 0
    expected = arrays["train_text"][1, 2:].copy()
    data = read_npz(_save(tmp_path / "d.npz", arrays))
    assert data.splits["train"].lengths["text"].tolist() == [3, 3, 5, 5]
    assert np.array_equal(data.splits["train"].features["text"][1, :3], expected)
    assert data.label_names == ["label_0", "label_1"]
    assert any(note.startswith("text: lengths derived") and "in front" in note for note in data.notes)


def test_given_lengths_win_over_zero_rows_and_clear_the_padding(tmp_path):
    arrays = _arrays()
    arrays["valid_text"][0, 1:] = 0
    arrays["valid_text"][1, 4] = np.nan  # past the length: padding, whatever it holds
    arrays["valid_text_lengths"] = np.array([5, 4], np.int32)
    data = read_npz(_save(tmp_path / "d.npz", arrays))
    assert data.splits["valid"].lengths["text"].tolist() == [5, 4]
    assert not data.splits["valid"].features["text"][1, 4].any()
    assert "text: values past the given lengths set to zero" in data.notes


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32, np.uint8])
def test_labels_of_any_numeric_dtype(tmp_path, dtype):
    arrays = _arrays()
    arrays["test_labels"] = arrays["test_labels"].astype(dtype)
    assert read_npz(_save(tmp_path / "d.npz", arrays)).splits["test"].labels.dtype == np.uint8


def test_wider_and_narrower_floats_become_float32(tmp_path):
    arrays = _arrays()
    arrays["train_text"] = arrays["train_text"].astype(np.float64)
    arrays["test_audio"] = arrays["test_audio"].astype(np.float16)
    data = read_npz(_save(tmp_path / "d.npz", arrays))
    assert data.splits["train"].features["text"].dtype == np.float32
    arrays["train_text"][0, 0, 0] = 1e300
    with pytest.raises(DataError, match="train text: expected finite values"):
        read_npz(_save(tmp_path / "d.npz", arrays))


WRONG = {
    "split": (lambda a: [a.pop(k) for k in list(a) if k.startswith("valid")], "no keys for split valid"),
    "labels": (lambda a: a.pop("test_labels"), "missing key test_labels"),
    "modality": (lambda a: a.pop("test_audio"), "missing key test_audio"),
    "extra modality": (lambda a: a.update(test_smell=a["test_audio"]), "missing key train_smell"),
    "unknown key": (lambda a: a.update(ids=np.arange(3)), "unknown key ids"),
    "unknown split": (lambda a: a.update(val_text=a["valid_text"]), "unknown key val_text; .* train, valid, test"),
    "N": (
        lambda a: a.update(train_text=a["train_text"][1:]),
        "train_text: expected 4 samples, as many as labels; got 3",
    ),
    "rank": (
        lambda a: a.update(train_text=a["train_text"][:, 0]),
        r"train_text: expected \(N, T, D\) floats; got .*\(4, 3\) \(a vector .* T = 1; .*_extras_{name}",
    ),
    "dtype": (lambda a: a.update(train_text=np.ones((4, 5, 3), int)), "train_text: .* floats; got int64"),
    "object array": (
        lambda a: a.update(train_text=np.array([[1], [1, 2]], object)),
        "key train_text: expected numbers or strings; got Python objects.* pad them",
    ),
    "label value": (
        lambda a: a.update(test_labels=np.full((3, 2), 0.5)),
        "test_labels: expected only 0 and 1, a column for each label; got 0.5",
    ),
    "label NaN": (lambda a: a.update(test_labels=np.full((3, 2), np.nan)), "expected only 0 and 1, .*; got nan"),
    "label rank": (lambda a: a.update(test_labels=np.zeros(3)), r"test_labels: expected \(N, K\) of 0 and 1"),
    "label count": (
        lambda a: a.update(test_labels=np.zeros((3, 5))),
        r"test labels: .*\(N, 2\), a column for each of the 2 label names; got .*\(3, 5\)",
    ),
    "length > T": (
        lambda a: a.update(test_text_lengths=np.array([1, 6, 2])),
        r"test_text_lengths: .*\[0, 5\]; got 6",
    ),
    "length < 0": (lambda a: a.update(test_text_lengths=np.array([1, -6, 2])), "got -6"),
    "length count": (
        lambda a: a.update(test_text_lengths=np.array([1, 2])),
        r"test_text_lengths: expected \(3,\) integers",
    ),
    "length dtype": (lambda a: a.update(test_text_lengths=np.ones(3)), "integers; got float64"),
    "stray lengths": (
        lambda a: a.update(test_smell_lengths=np.ones(3, int)),
        "test_smell_lengths has no array test_smell",
    ),
    "NaN": (
        lambda a: a["valid_audio"].__setitem__((1, 2, 0), np.nan),
        "valid audio: expected finite .* sample 1, step 2 .*--replace-nonfinite",
    ),
    "names count": (lambda a: a.update(label_names=np.array(["x"])), r"train labels: .*\(N, 1\)"),
    "names dtype": (lambda a: a.update(label_names=np.arange(2)), r"label_names: expected \(K,\) strings"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_by_key(tmp_path, case):
    arrays = _arrays()
    damage, message = WRONG[case]
    damage(arrays)
    with pytest.raises(DataError, match=message):
        read_npz(_save(tmp_path / "d.npz", arrays))


def test_load_names_the_file_and_what_is_wrong_with_it(tmp_path):
    good = _save(tmp_path / "good.npz", _arrays())
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "noise.npz").write_bytes(b"noise")
    (tmp_path / "empty.npz").write_bytes(b"")
    flipped = bytearray(good.read_bytes())
    flipped[200] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    (tmp_path / "table.csv").write_text("a,b")
    for name, message in {
        "cut.npz": "not a readable .npz",
        "noise.npz": r"not a readable .npz file \(it is no zip archive\)",
        "empty.npz": "not a readable .npz",
        "flipped.npz": "key train_text cannot be read .*CRC",
        "single.npz": "got a single array",
        "table.csv": r"one of \.npz, \.safetensors, \.pt, \.pkl, \.csd, .*; got suffix '\.csv' .*write an \.npz",
        "absent.npz": "no such file",
        ".": "got a directory",
    }.items():
        with pytest.raises(DataError, match=message):
            load(tmp_path / name)


def _large(make_small, tmp_path, monkeypatch):
    """A file whose arrays are mapped, and its data."""
    monkeypatch.setattr(npz, "MAP_FROM", 1)
    data = make_small()
    write_npz(data, tmp_path / "d.npz", compress=False)
    return data, tmp_path / "d.npz"


def test_large_stored_arrays_are_mapped_aligned_and_read_only(make_small, tmp_path, monkeypatch):
    data, path = _large(make_small, tmp_path, monkeypatch)
    again = load(path)
    for name, split in again.splits.items():
        for modality, values in split.features.items():
            assert np.array_equal(values, data.splits[name].features[modality])
            assert not values.flags.writeable
            assert not values.flags.owndata
            assert values.flags.aligned
            assert values.ctypes.data % 64 == 0
    path.unlink()  # the map keeps the file
    batch = collate(SequenceDataset(again.splits["train"]).__getitems__([0, 2]))
    assert batch.features["text"].is_contiguous()


def test_a_mapped_array_is_copied_where_it_has_to_change(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "MAP_FROM", 1)
    arrays = _arrays()
    arrays["train_text"][1, :2] = 0
    arrays["valid_audio"] = np.asfortranarray(arrays["valid_audio"])
    arrays["valid_text_lengths"] = np.array([5, 4])
    path = _save(tmp_path / "d.npz", arrays)
    before = path.read_bytes()
    data = read_npz(path)
    assert data.splits["train"].lengths["text"][1] == 3
    assert np.array_equal(data.splits["valid"].features["audio"], arrays["valid_audio"])
    assert not data.splits["valid"].features["text"][1, 4].any()
    assert path.read_bytes() == before


def test_damage_in_a_mapped_file_is_found(make_small, tmp_path, monkeypatch):
    _, path = _large(make_small, tmp_path, monkeypatch)
    whole = path.read_bytes()
    position = whole.index(b"train_text.npy") + 400
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    with pytest.raises(DataError, match=r"key train_text cannot be read .*CRC"):
        load(path)


@pytest.mark.parametrize("compress", [True, False])
def test_the_same_data_give_the_same_bytes(make_small, tmp_path, compress):
    for name in ("a.npz", "b.npz"):
        write_npz(make_small(), tmp_path / name, compress=compress)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as stored:
        assert stored["train_text"].dtype == np.float32


def test_load_selects_modalities(tmp_path):
    path = _save(tmp_path / "good.npz", _arrays())
    assert list(load(path, modalities=["audio"]).modalities) == ["audio"]
    with pytest.raises(DataError, match=r"'smell' not in .*good\.npz; available: text, audio"):
        load(str(path), modalities=["smell"])

from __future__ import annotations

import h5py
import numpy as np
import pytest

from mmer_fast.data import DataError, load
from mmer_fast.data.loading import read_unchecked

SIZES = {"trn": 4, "val": 2, "tst": 3}
FEATURES = {"A/comparE.h5": 4, "V/denseface.h5": 3, "L/bert_large.h5": 5}


def _ids(part: str) -> list[str]:
    return [f"Ses01F_{part}_F{i:03d}" for i in range(SIZES[part])]


def _write(root, classes=False, folds=("1",)):
    """MMIN's folder, small: four classes, sequences of 1 to 4 steps."""
    rng = np.random.default_rng(0)
    for name, size in FEATURES.items():
        (root / name).parent.mkdir(exist_ok=True)
        with h5py.File(root / name, "w") as h5:
            for part in SIZES:
                for i, utterance in enumerate(_ids(part)):
                    h5[utterance] = rng.standard_normal((i + 1, size)).astype(np.float32)
    for fold in folds:
        folder = root / "target" / fold
        folder.mkdir(parents=True)
        for part, n in SIZES.items():
            names = np.array(_ids(part), dtype="U" if classes else "S")
            np.save(folder / f"{part}_int2name.npy", names if classes else names[:, None])
            np.save(folder / f"{part}_label.npy", np.arange(n) if classes else np.eye(4)[:n])
    return root


@pytest.mark.parametrize("classes", [False, True])
def test_iemocap_and_msp_forms(tmp_path, classes):
    data = load(_write(tmp_path, classes))
    assert read_unchecked(tmp_path)[0].name == "mmin"
    assert data.modalities == {"text": 5, "video": 3, "audio": 4}
    assert data.label_names == [f"label_{k}" for k in range(4)]
    assert np.array_equal(data.splits["train"].labels, np.eye(4))
    assert data.splits["train"].lengths["audio"].tolist() == [1, 2, 3, 4]
    with h5py.File(tmp_path / "V/denseface.h5") as h5:
        assert np.array_equal(data.splits["test"].features["video"][2, :3], h5[_ids("tst")[2]][()])


def test_sequences_of_one_length_may_be_padded_with_zeros(tmp_path):
    _write(tmp_path)
    with h5py.File(tmp_path / "V/denseface.h5", "w") as h5:
        for part in SIZES:
            for utterance in _ids(part):
                h5[utterance] = np.array([[1, 1, 1], [2, 2, 2], [0, 0, 0]], np.float32)
        h5[_ids("trn")[1]][...] = 0
    data = load(tmp_path)
    assert data.splits["train"].lengths["video"].tolist() == [2, 0, 2, 2]
    assert "video: lengths derived from all-zero rows" in data.notes


def test_a_fold_is_chosen_by_its_folder(tmp_path):
    _write(tmp_path, folds=("1", "2", "10"))
    np.save(tmp_path / "target/2/trn_label.npy", np.eye(4)[::-1])
    assert any(note.startswith("fold 1 of 3; name another by its folder") for note in load(tmp_path).notes)
    data = load(tmp_path / "target" / "2")
    assert np.array_equal(data.splits["train"].labels, np.eye(4)[::-1])
    assert data.notes == ["labels are numbered: the file does not name its 4 labels"]


def test_several_files_a_modality_and_a_missing_one(tmp_path):
    _write(tmp_path)
    with h5py.File(tmp_path / "A/comparE_mean_std.h5", "w") as h5:
        h5["1/mean"] = np.zeros(4)
    data = load(tmp_path)
    assert "audio: as in the file, not normalised by comparE_mean_std.h5" in data.notes
    (tmp_path / "V/denseface.h5").unlink()
    assert list(load(tmp_path).modalities) == ["text", "audio"]
    (tmp_path / "A/comparE.h5").rename(tmp_path / "A/wav2vec.h5")
    with pytest.raises(DataError, match=r"A: expected comparE\.h5, or a single \.h5; got several others"):
        load(tmp_path)


def _h5(name, change):
    def damage(root):
        with h5py.File(root / name, "a") as h5:
            change(h5)

    return damage


def _npy(name, array):
    return lambda root: np.save(root / "target" / "1" / name, array)


def _replace(h5, array):
    del h5[_ids("tst")[1]]
    h5[_ids("tst")[1]] = array


WRONG = {
    "utterance": (
        _h5("A/comparE.h5", lambda h5: h5.__delitem__(_ids("tst")[1])),
        "comparE.h5: missing 'Ses01F_tst_F001'",
    ),
    "D": (
        _h5("A/comparE.h5", lambda h5: _replace(h5, np.ones((2, 3), np.float32))),
        "F001': expected 4 features; got 3",
    ),
    "rank": (
        _h5("A/comparE.h5", lambda h5: _replace(h5, np.ones(4, np.float32))),
        r"expected numbers of 2 axes; got .*\(4,\)",
    ),
    "dtype": (_h5("A/comparE.h5", lambda h5: _replace(h5, np.ones((2, 4), int))), "2 axes; got int64"),
    "no files": (lambda root: [(root / name).unlink() for name in FEATURES], r"expected \.h5 files in A, V or L"),
    "no fold": (lambda root: (root / "target/1").rename(root / "old"), "target: expected a folder a fold"),
    "label file": (lambda root: (root / "target/1/tst_label.npy").unlink(), r"tst_label\.npy: no such file"),
    "label count": (_npy("tst_label.npy", np.eye(4)[:2]), r"tst_label\.npy: expected 3 rows; got 2"),
    "label value": (_npy("tst_label.npy", np.full((3, 4), 0.5)), r"tst_label\.npy: expected \(N, K\) of 0 and 1"),
    "label form": (_npy("tst_label.npy", np.arange(3)), "expected labels of one form in every split"),
    "names": (
        _npy("tst_int2name.npy", np.arange(3)),
        r"tst_int2name\.npy: expected \(N,\) or \(N, 1\) strings; got int64",
    ),
    "objects": (_npy("tst_label.npy", np.array([[1], [1, 2], 3], object)), "not a readable .npy file .*allow_pickle"),
    "not HDF5": (lambda root: (root / "A/comparE.h5").write_bytes(b"x"), r"comparE\.h5: not a readable HDF5 file"),
    "not an array": (lambda root: (root / "target/1/tst_label.npy").write_bytes(b"x"), r"not a readable \.npy file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_refused(tmp_path, case):
    damage, message = WRONG[case]
    damage(_write(tmp_path))
    with pytest.raises(DataError, match=message):
        load(tmp_path)

"""The folder that MMIN trains on.

    A/comparE.h5, V/denseface.h5, L/bert_large.h5     one data set (T, D) an utterance, named by its id
    target/{fold}/{trn,val,tst}_int2name.npy          (N,) or (N, 1) ids, strings or bytes
    target/{fold}/{trn,val,tst}_label.npy             (N, K) of 0 and 1, or (N,) class numbers

A, V and L are called audio, video and text; a folder may be missing. Where one holds several ``.h5`` the one above
is read. ``path`` may name a fold, ``.../target/3``; of the folder itself the first fold is read. comparE is read
as it is: the means in ``comparE_mean_std.h5`` are not applied. Labels are numbered, since the files do not
name them. For prediction the ids of a split, or its labels, may be missing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast._files import write_folder_atomically
from mmer_fast.data.containers import MultiModalData, Split, no_labels
from mmer_fast.data.errors import DataError, MissingPart
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.hdf5 import numbers, open_hdf5, require_h5py, rows, write_hdf5
from mmer_fast.data.labels import as_numbers, numbered, one_hot
from mmer_fast.data.needs import Needs
from mmer_fast.data.sequences import decoded, describe, pad
from mmer_fast.data.writing import require_modalities, samples

FOLDERS = {"text": "L", "video": "V", "audio": "A"}
USUAL_FILES = {"text": "bert_large.h5", "video": "denseface.h5", "audio": "comparE.h5"}
PARTS = {"train": "trn", "valid": "val", "test": "tst"}


def write_mmin(data: MultiModalData, path: str | Path) -> None:
    """Write text, video and audio as a new folder with one fold, whole or not at all; label names and extras are left
    out.

    Raises:
        DataError: other modalities, the folder exists, or h5py is missing.
    """
    require_modalities("MMIN's folder", data, ("text", "video", "audio"))
    require_h5py(Path(path))
    ids = {name: [f"{name}_{i:05d}" for i in range(len(split))] for name, split in data.splits.items()}

    def fill(modality: str, h5: Any) -> None:
        for name, split in data.splits.items():
            for utterance, sequence in zip(ids[name], samples(split, modality), strict=True):
                h5.create_dataset(utterance, data=sequence)

    def write(folder: Path) -> None:
        for modality in data.modalities:
            (folder / FOLDERS[modality]).mkdir()
            write_hdf5(folder / FOLDERS[modality] / USUAL_FILES[modality], partial(fill, modality))
        fold = folder / "target" / "1"
        fold.mkdir(parents=True)
        for name, split in data.splits.items():
            np.save(fold / f"{PARTS[name]}_int2name.npy", np.array(ids[name], dtype=np.bytes_)[:, None])
            np.save(fold / f"{PARTS[name]}_label.npy", split.labels.astype(np.float64))

    write_folder_atomically(Path(path), write)


def _detect(source: Source) -> bool:
    root = _root(source.path)[0]
    return source.path.is_dir() and (root / "target").is_dir() and any((root / x).is_dir() for x in FOLDERS.values())


def _root(path: Path) -> tuple[Path, Path | None]:
    """The folder, and the fold that the path names."""
    return (path.parent.parent, path) if path.parent.name == "target" else (path, None)


def _read(source: Source) -> MultiModalData:
    root, fold = _root(source.path)
    notes: list[str] = []
    if fold is None:
        fold = _first_fold(root / "target", notes)
    files = {name: _feature_file(root / FOLDERS[name], USUAL_FILES[name]) for name in FOLDERS}
    found = {name: file for name, file in files.items() if file is not None}
    if not found:
        raise DataError(f"{root}: expected .h5 files in A, V or L; got none")
    wanted = source.needs.wanted([split for split, part in PARTS.items() if (fold / f"{part}_int2name.npy").is_file()])
    ids = {split: _ids(fold / f"{PARTS[split]}_int2name.npy") for split in wanted}
    values = _values(fold, ids, source.needs)
    count = _label_count(fold, values) if values else 0
    splits = {}
    for split in wanted:
        splits[split] = Split({}, {}, no_labels(len(ids[split])))
        if split in values:
            where = f"{fold / PARTS[split]}_label.npy"
            labels = values[split] if values[split].ndim == 2 else one_hot(where, values[split], count)
            splits[split].labels = labels.astype(np.uint8)
    for name, file in found.items():
        for split in wanted:
            splits[split].features[name], splits[split].lengths[name] = _features(name, file, ids[split], notes)
    sizes = {name: splits[wanted[0]].features[name].shape[2] for name in found}
    names = numbered(count, notes) if values else []
    if (root / "A" / "comparE_mean_std.h5").is_file() and "audio" in found:
        notes.append("audio: as in the file, not normalised by comparE_mean_std.h5")
    return MultiModalData(splits, names, sizes, str(source.path), list(dict.fromkeys(notes)))


def _first_fold(target: Path, notes: list[str]) -> Path:
    folds = sorted((p for p in target.iterdir() if p.is_dir()), key=lambda p: (len(p.name), p.name))
    if not folds:
        raise DataError(f"{target}: expected a folder a fold, 1, 2, ...; got none")
    if len(folds) > 1:
        notes.append(f"fold {folds[0].name} of {len(folds)}; name another by its folder, e.g. {folds[1]}")
    return folds[0]


def _feature_file(folder: Path, usual: str) -> Path | None:
    files = sorted(folder.glob("*.h5")) if folder.is_dir() else []
    if len(files) > 1:
        files = [file for file in files if file.name == usual]
        if not files:
            raise DataError(f"{folder}: expected {usual}, or a single .h5; got several others")
    return files[0] if files else None


def _load(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise MissingPart(f"{path}: no such file") from None
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{path}: not a readable .npy file ({str(error)[:200]})") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: expected a single array; got {type(array).__name__}")
    return array


def _ids(path: Path) -> list[str]:
    array = _load(path)
    if array.dtype.kind not in "SU" or array.ndim == 0 or array.size != len(array) or array.size == 0:
        raise DataError(f"{path}: expected (N,) or (N, 1) strings; got {describe(array)}")
    return [decoded(name) for name in array.reshape(-1).tolist()]


def _values(fold: Path, ids: dict[str, list[str]], needs: Needs) -> dict[str, np.ndarray]:
    """The label numbers of the splits that have them, or have to."""
    files = {split: fold / f"{PARTS[split]}_label.npy" for split in ids}
    return {s: _numbers(file, len(ids[s])) for s, file in files.items() if needs.labels or file.is_file()}


def _numbers(path: Path, n: int) -> np.ndarray:
    values = as_numbers(str(path), _load(path), n)
    if values.ndim > 2 or (values.ndim == 2 and ((values != 0) & (values != 1)).any()):
        raise DataError(f"{path}: expected (N, K) of 0 and 1, or (N,) class numbers; got {describe(values)}")
    return values


def _label_count(fold: Path, values: dict[str, np.ndarray]) -> int:
    shapes = {x.shape[1:] for x in values.values()}
    if len(shapes) != 1:
        raise DataError(f"{fold}: expected labels of one form in every split; got {', '.join(map(str, shapes))}")
    shape = shapes.pop()
    if shape:
        return shape[0]
    largest = max(float(x.max()) for x in values.values())
    if not 0 <= largest < 100:
        raise DataError(f"{fold}: labels: expected class numbers from 0 to 99; got {largest:g}")
    return int(largest) + 1


def _features(name: str, file: Path, ids: list[str], notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N, T, D) features and (N,) lengths of a split's utterances."""
    with open_hdf5(file) as h5:
        sets: list[Any] = [numbers(h5, utterance, str(file)) for utterance in ids]
        size = sets[0].shape[1]
        for utterance, found in zip(ids, sets, strict=True):
            if found.shape[1] != size or size == 0:
                raise DataError(f"{file}: {utterance!r}: expected {max(1, size)} features; got {found.shape[1]}")
        return pad(name, [found.shape for found in sets], (rows(found) for found in sets), notes)


FORMAT = Format(
    name="mmin",
    title="a folder of MMIN (A, V, L and target)",
    detect=_detect,
    read=_read,
    write=lambda data, path: write_mmin(data, path),
)

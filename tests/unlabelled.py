"""Files of every format made as users have them whose labels nobody knows: without labels, or without other splits."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from mmer_fast.data.mmin import PARTS
from mmer_fast.data.needs import SPLITS
from mmer_fast.data.safe_load import load_plain

LABEL_KEYS = ("tgt", "labels", "classification_labels", "regression_labels", "annotations")


def strip(name: str, path: Path, splits: Sequence[str], unlabelled: Sequence[str] = SPLITS) -> None:
    """Change a written file or folder of a format: keep ``splits``, and of these ``unlabelled`` without labels.

    CMU-MultimodalSDK's folder keeps its labels, which say where segments begin and end.
    """
    _STRIP[name](path, splits, unlabelled)


def _kept(key: str, splits: Sequence[str], unlabelled: Sequence[str]) -> bool:
    split = key.partition("_")[0]
    return split in splits and not (key == f"{split}_labels" and split in unlabelled)


def _npz(path: Path, splits: Sequence[str], unlabelled: Sequence[str]) -> None:
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files if _kept(key, splits, unlabelled)}
        if set(splits) - set(unlabelled):
            arrays["label_names"] = stored["label_names"]
    np.savez(path, **arrays)


def _safetensors(path: Path, splits: Sequence[str], unlabelled: Sequence[str]) -> None:
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
        arrays = {key: file.get_tensor(key) for key in file.keys() if _kept(key, splits, unlabelled)}  # noqa: SIM118
    if not set(splits) - set(unlabelled):
        del metadata["label_names"]
    save_file(arrays, path, metadata)


def _sections(content: dict, splits: Sequence[str], unlabelled: Sequence[str]) -> dict:
    return {
        split: {key: x for key, x in content[split].items() if split not in unlabelled or key not in LABEL_KEYS}
        for split in splits
    }


def _pickle(path: Path, splits: Sequence[str], unlabelled: Sequence[str]) -> None:
    content = _sections(pickle.loads(path.read_bytes()), splits, unlabelled)
    path.write_bytes(pickle.dumps(content))


def _tailor(path: Path, splits: Sequence[str], unlabelled: Sequence[str]) -> None:
    torch.save(_sections(load_plain(path), splits, unlabelled), path)


def _univa(path: Path, splits: Sequence[str], unlabelled: Sequence[str]) -> None:
    for file in sorted(path.rglob("*.pkl")):
        split = file.name.split("_")[1]
        content = pickle.loads(file.read_bytes())
        if split not in splits:
            file.unlink()
        elif split in unlabelled and split in content:
            del content["num_labels"], content[split]["labels_class"]
            file.write_bytes(pickle.dumps(content))


def _mmin(path: Path, splits: Sequence[str], unlabelled: Sequence[str]) -> None:
    for split, part in PARTS.items():
        if split not in splits:
            (path / "target" / "1" / f"{part}_int2name.npy").unlink()
        if split not in splits or split in unlabelled:
            (path / "target" / "1" / f"{part}_label.npy").unlink()


def _mmgcn(path: Path, splits: Sequence[str], unlabelled: Sequence[str]) -> None:
    """The layout has one list for training and validation."""
    content = list(pickle.loads(path.read_bytes()))
    lists = {"train": 7, "test": 8}
    for split, index in lists.items():
        if split in unlabelled:
            content[2] = {dialogue: x for dialogue, x in content[2].items() if dialogue not in content[index]}
        if split not in splits:
            content[index] = []
    path.write_bytes(pickle.dumps(tuple(content)))


def _csd(path: Path, splits: Sequence[str], unlabelled: Sequence[str]) -> None:
    folds = json.loads((path / "splits.json").read_text())
    (path / "splits.json").write_text(json.dumps({split: folds[split] for split in splits}))


_STRIP: dict[str, Callable[[Path, Sequence[str], Sequence[str]], None]] = {
    "npz": _npz,
    "safetensors": _safetensors,
    "tailor": _tailor,
    "univa": _univa,
    "mmsa": _pickle,
    "mult": _pickle,
    "mmgcn": _mmgcn,
    "csd": _csd,
    "mmin": _mmin,
}

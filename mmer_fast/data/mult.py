"""``{dataset}_data.pkl`` and ``{dataset}_data_noalign.pkl`` of MulT.

    [split]["vision" | "text" | "audio"]     (N, T, D) float
    [split]["labels"]                        (N, 1, 1) sentiment, (N, 4, 2) IEMOCAP, or (N, 1, 6 | 7) emotions
    [split]["id"]                            not used

with split one of train, valid, test. Pairs are [absent, present] for neutral, happy, sad, angry in this order.
A sentiment becomes the classes negative, neutral and positive. Axes of length 1 may be missing. ``vision`` is
called video.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmer_fast.data.containers import SPLITS, MultiModalData, Split
from mmer_fast.data.errors import DataError
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.labels import as_numbers, from_columns, from_pairs
from mmer_fast.data.mmsa import LABEL_KEYS, MODALITY_KEYS
from mmer_fast.data.sequences import as_features, describe, settle
from mmer_fast.data.writing import require_modalities, write_pickle


def read_mult(path: str | Path) -> MultiModalData:
    """Read a pickle of MulT; nothing in it is executed (see `safe_pickle`).

    Raises:
        DataError: naming the split and key, what was expected and what came.
    """
    return _read(Source(path)).check()


def write_mult(data: MultiModalData, path: str | Path) -> None:
    """Write text, video and audio in MulT's layout, whole or not at all; labels as columns of 0 and 1 if they are
    six, else as pairs. Lengths are left to be derived, extras and other label names are left out.

    Raises:
        DataError: other modalities.
    """
    require_modalities("a MulT file", data, ("text", "video", "audio"))
    content = {}
    for name, split in data.splits.items():
        labels = split.labels.astype(np.float32)
        ids = [[f"sample {i}".encode(), b"0.0", b"1.0"] for i in range(len(split))]
        content[name] = {
            **{key: split.features[modality] for key, modality in MODALITY_KEYS.items()},
            "labels": labels[:, None, :] if labels.shape[1] == 6 else np.stack([1 - labels, labels], axis=2),
            "id": np.array(ids),
        }
    write_pickle(Path(path), content)


def _detect(source: Source) -> bool:
    return source.is_pickle and any(
        "labels" in section
        and not any(key in section for key in LABEL_KEYS)
        and any(key in section for key in MODALITY_KEYS)
        for section in source.sections().values()
    )


def _read(source: Source) -> MultiModalData:
    path, sections = source.path, source.all_sections()
    keys = [key for key in MODALITY_KEYS if key in sections["train"]]
    if not keys:
        raise DataError(f"{path}: train: expected some of {', '.join(MODALITY_KEYS)}; got none")
    notes: list[str] = []
    names: dict[str, list[str]] = {}
    splits = {}
    for split in SPLITS:
        section = sections[split]
        for key in (*keys, "labels"):
            if key not in section:
                raise DataError(f"{path}: {split}: missing key {key}; got {', '.join(map(str, section)) or 'none'}")
        labels, names[split] = _labels(f"{path}: {split} labels", section["labels"], notes)
        features, lengths = {}, {}
        for key in keys:
            values = as_features(f"{path}: {split} {key}", section[key], len(labels))
            name = MODALITY_KEYS[key]
            features[name], lengths[name] = settle(name, values, None, notes)
        splits[split] = Split(features, lengths, labels)
        if names[split] != names["train"]:
            raise DataError(
                f"{path}: {split} labels: expected {len(names['train'])} as in train; got {labels.shape[1]}"
            )
    sizes = {MODALITY_KEYS[key]: splits["train"].features[MODALITY_KEYS[key]].shape[2] for key in keys}
    return MultiModalData(splits, names["train"], sizes, str(path), list(dict.fromkeys(notes)))


def _labels(where: str, value: object, notes: list[str]) -> tuple[np.ndarray, list[str]]:
    numbers = as_numbers(where, value)
    if numbers.ndim == 3 and numbers.shape[2] == 2 and numbers.shape[1] > 1:
        return from_pairs(numbers, notes)
    if numbers.ndim > 3 or numbers.size != len(numbers) * max((1, *numbers.shape[1:])):
        raise DataError(f"{where}: expected (N, 1, 1), (N, K, 2), (N, 1, 6) or (N, 1, 7); got {describe(value)}")
    return from_columns(where, numbers.reshape(len(numbers), -1), notes)


FORMAT = Format(
    name="mult",
    title="a .pkl of MulT (..._data, ..._data_noalign)",
    detect=_detect,
    read=_read,
    write=lambda data, path: write_mult(data, path),
    suffix=".pkl",
)

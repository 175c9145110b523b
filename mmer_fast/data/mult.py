"""``{dataset}_data.pkl`` and ``{dataset}_data_noalign.pkl`` of MulT.

    [split]["vision" | "text" | "audio"]     (N, T, D) float
    [split]["labels"]                        (N, 1, 1) sentiment, (N, 4, 2) IEMOCAP, or (N, 1, 6 | 7) emotions
    [split]["id"]                            not used

with split one of train, valid, test. Pairs are [absent, present] for neutral, happy, sad, angry in this order.
A sentiment becomes the classes negative, neutral and positive. Axes of length 1 may be missing. ``vision`` is
called video. For prediction a split, or its ``labels``, may be missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.errors import DataError, MissingPart
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.labels import as_numbers, from_columns, from_pairs
from mmer_fast.data.mmsa import LABEL_KEYS, MODALITY_KEYS
from mmer_fast.data.sequences import SampleCount, as_features, describe, settle
from mmer_fast.data.writing import require_modalities, write_pickle


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
    if not source.is_pickle:
        return False
    sections = [section for section in source.sections().values() if any(key in section for key in MODALITY_KEYS)]
    labelled = any("labels" in section and not any(key in section for key in LABEL_KEYS) for section in sections)
    bare = bool(sections) and all(set(section) <= {*MODALITY_KEYS, "id"} for section in sections)
    return labelled or bare


def _read(source: Source) -> MultiModalData:
    path, sections = source.path, source.wanted_sections()
    first = next(iter(sections))
    keys = [key for key in MODALITY_KEYS if key in sections[first]]
    if not keys:
        raise DataError(f"{path}: {first}: expected some of {', '.join(MODALITY_KEYS)}; got none")
    notes: list[str] = []
    names: dict[str, list[str]] = {}
    splits = {}
    for split, section in sections.items():
        for key in keys:
            if key not in section:
                raise DataError(_missing(path, split, key, section))
        if source.needs.labels and "labels" not in section:
            raise MissingPart(_missing(path, split, "labels", section))
        labels = None
        if "labels" in section:
            labels, names[split] = _labels(f"{path}: {split} labels", section["labels"], notes)
            other = next(iter(names))
            if names[split] != names[other]:
                where = f"{path}: {split} labels"
                raise DataError(f"{where}: expected {len(names[other])} as in {other}; got {len(names[split])}")
        samples = SampleCount(labels)
        features, lengths = {}, {}
        for key in keys:
            values = as_features(f"{path}: {split} {key}", section[key], samples)
            name = MODALITY_KEYS[key]
            features[name], lengths[name] = settle(name, values, None, notes)
        splits[split] = Split(features, lengths, samples.labels)
    sizes = {MODALITY_KEYS[key]: splits[first].features[MODALITY_KEYS[key]].shape[2] for key in keys}
    return MultiModalData(splits, next(iter(names.values()), []), sizes, str(path), list(dict.fromkeys(notes)))


def _missing(path: Path, split: str, key: str, section: dict) -> str:
    return f"{path}: {split}: missing key {key}; got {', '.join(map(str, section)) or 'none'}"


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

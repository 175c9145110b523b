"""``aligned_50.pkl`` and ``unaligned_50.pkl`` of MMSA.

    [split]["text" | "audio" | "vision"]     (N, T, D) float; a missing one is left out in every split
    [split]["text_bert"]                     (N, 3, T) token ids, mask, segments: its mask gives the lengths of text
    [split]["audio_lengths" | "vision_lengths"]   (N,) in unaligned files
    [split]["classification_labels"]         (N,) class numbers
    [split]["annotations"]                   N names of these classes
    [split]["regression_labels"]             (N,) sentiment
    [split]["raw_text" | "id"]               not used

with split one of train, valid, test. Such files have a sentiment and no emotions. Its classes become the
labels, one column each: those of ``classification_labels``, named by ``annotations`` where they agree, else
negative, neutral and positive by the sign of ``regression_labels``. The sentiment is kept as extra
``sentiment``. ``vision`` is called video.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast.data.containers import SPLITS, MultiModalData, Split
from mmer_fast.data.errors import DataError
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.labels import SENTIMENT, SENTIMENT_NOTE, as_numbers, narrow, one_hot, sentiment_classes
from mmer_fast.data.sequences import as_features, as_lengths, decoded, describe, settle
from mmer_fast.data.writing import require_emotions, require_modalities, sentiment_of, write_pickle

MODALITY_KEYS = {"text": "text", "vision": "video", "audio": "audio"}
LABEL_KEYS = ("classification_labels", "regression_labels")


def read_mmsa(path: str | Path) -> MultiModalData:
    """Read a pickle of MMSA; nothing in it is executed (see `safe_pickle`).

    Raises:
        DataError: naming the split and key, what was expected and what came.
    """
    return _read(Source(path)).check()


def write_mmsa(data: MultiModalData, path: str | Path) -> None:
    """Write text, video and audio in MMSA's unaligned layout, whole or not at all.

    The six emotions become a sentiment (see `writing.sentiment_of`), which is all that the format holds.

    Raises:
        DataError: other modalities or labels.
    """
    require_modalities("an MMSA file", data, ("text", "video", "audio"))
    require_emotions("an MMSA file", data)
    content = {}
    for name, split in data.splits.items():
        sentiment_n = sentiment_of(split.labels)
        classes_n = np.sign(sentiment_n).astype(np.int64) + 1
        mask_nt = np.arange(split.features["text"].shape[1]) < split.lengths["text"][:, None]
        ids_nt = mask_nt.astype(np.int64) * 100
        content[name] = {
            "raw_text": np.array([f"sample {i}" for i in range(len(split))]),
            "id": [f"video$_${i}" for i in range(len(split))],
            **{key: split.features[modality] for key, modality in MODALITY_KEYS.items()},
            "text_bert": np.stack([ids_nt, mask_nt, np.zeros_like(ids_nt)], axis=1).astype(np.float32),
            "audio_lengths": split.lengths["audio"].tolist(),
            "vision_lengths": split.lengths["video"].tolist(),
            "annotations": [SENTIMENT[c].title() for c in classes_n],
            "classification_labels": classes_n.astype(np.float32),
            "regression_labels": sentiment_n,
        }
    write_pickle(Path(path), content)


def _detect(source: Source) -> bool:
    return source.is_pickle and any(key in section for section in source.sections().values() for key in LABEL_KEYS)


def _read(source: Source) -> MultiModalData:
    path, sections = source.path, source.all_sections()
    keys = [key for key in MODALITY_KEYS if key in sections["train"]]
    if not keys:
        got = ", ".join(map(str, sections["train"]))
        raise DataError(f"{path}: train: expected some of {', '.join(MODALITY_KEYS)}; got {got}")
    notes: list[str] = []
    labels, label_names, extras = _labels(path, sections, notes)
    splits = {}
    for split in SPLITS:
        features, lengths = {}, {}
        for key in keys:
            name, where = MODALITY_KEYS[key], f"{path}: {split} {key}"
            values = as_features(where, _item(path, split, sections[split], key), len(labels[split]))
            given = _lengths(path, split, sections[split], key, values.shape)
            features[name], lengths[name] = settle(name, values, given, notes)
        splits[split] = Split(features, lengths, labels[split], extras[split])
    sizes = {MODALITY_KEYS[key]: splits["train"].features[MODALITY_KEYS[key]].shape[2] for key in keys}
    return MultiModalData(splits, label_names, sizes, str(path), list(dict.fromkeys(notes)))


def _item(path: Path, split: str, section: dict, key: str) -> Any:
    if key not in section:
        raise DataError(f"{path}: {split}: missing key {key}; got {', '.join(map(str, section)) or 'none'}")
    return section[key]


def _lengths(path: Path, split: str, section: dict, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Lengths that the file states, None where it states none."""
    n, steps, _ = shape
    if key == "text":
        tokens = section.get("text_bert")
        if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iufb" or tokens.shape != (n, 3, steps):
            return None  # of other tokens than the features
        mask_nt = tokens[:, 1] > 0
        lengths_n = mask_nt.sum(axis=1)
        return lengths_n if np.array_equal(mask_nt, np.arange(steps) < lengths_n[:, None]) else None
    given = section.get(f"{key}_lengths")
    return None if given is None else as_lengths(f"{path}: {split} {key}_lengths", given, n, steps)


def _labels(
    path: Path, sections: dict[str, dict], notes: list[str]
) -> tuple[dict[str, np.ndarray], list[str], dict[str, dict[str, np.ndarray]]]:
    """By split: (N, K) uint8 and the extras; and the K names."""
    by_class = all("classification_labels" in sections[split] for split in SPLITS)
    key = "classification_labels" if by_class else "regression_labels"
    values = {s: _column(f"{path}: {s} {key}", _item(path, s, sections[s], key)) for s in SPLITS}
    extras: dict[str, dict[str, np.ndarray]] = {}
    for split in SPLITS:
        sentiment = sections[split].get("regression_labels")
        extras[split] = {}
        if sentiment is not None:
            where = f"{path}: {split} regression_labels"
            extras[split]["sentiment"] = narrow(_column(where, sentiment, len(values[split])))
    if not by_class:
        notes.append(SENTIMENT_NOTE)
        return {split: sentiment_classes(x) for split, x in values.items()}, list(SENTIMENT), extras
    classes = sorted({x for split in SPLITS for x in values[split].tolist()})
    names = _class_names(classes, values, sections)
    notes.append(f"labels are the file's classes of sentiment, one column each: {', '.join(names)}")
    index = {split: np.searchsorted(classes, x).astype(np.float64) for split, x in values.items()}
    if any(x != int(x) for x in classes) or len(classes) > 20:
        raise DataError(f"{path}: {key}: expected at most 20 whole class numbers; got {str(classes[:5])[1:-1]}, ...")
    return {s: one_hot(f"{path}: {s} {key}", x, len(classes)) for s, x in index.items()}, names, extras


def _column(where: str, value: Any, n: int | None = None) -> np.ndarray:
    numbers = as_numbers(where, value, n)
    if numbers.size != len(numbers):
        raise DataError(f"{where}: expected one number a sample; got {describe(value)}")
    return numbers.reshape(-1)


def _class_names(classes: list[float], values: dict[str, np.ndarray], sections: dict[str, dict]) -> list[str]:
    """The annotation of each class where every class has exactly one of its own, else class_<number>."""
    found: dict[float, set[str]] = {}
    for split in SPLITS:
        annotations = sections[split].get("annotations")
        if not isinstance(annotations, (list, tuple, np.ndarray)) or len(annotations) != len(values[split]):
            return [f"class_{x:g}" for x in classes]
        for number, annotation in zip(values[split].tolist(), annotations, strict=True):
            found.setdefault(number, set()).add(decoded(annotation).strip().lower())
    names = [next(iter(found[x])) for x in classes]
    if any(len(found[x]) != 1 for x in classes) or len(set(names)) != len(names) or not all(names):
        return [f"class_{x:g}" for x in classes]
    return names


FORMAT = Format(
    name="mmsa",
    title="a .pkl of MMSA (aligned_50, unaligned_50)",
    detect=_detect,
    read=_read,
    write=lambda data, path: write_mmsa(data, path),
    suffix=".pkl",
)

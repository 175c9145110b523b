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
``sentiment``. ``vision`` is called video. For prediction a split may be missing, or its classes and sentiment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.errors import DataError, MissingPart
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.labels import SENTIMENT, SENTIMENT_NOTE, as_numbers, narrow, one_hot, sentiment_classes
from mmer_fast.data.needs import Needs
from mmer_fast.data.sequences import SampleCount, as_features, as_lengths, decoded, describe, settle
from mmer_fast.data.writing import require_emotions, require_modalities, sentiment_of, write_pickle

MODALITY_KEYS = {"text": "text", "vision": "video", "audio": "audio"}
LABEL_KEYS = ("classification_labels", "regression_labels")
_OTHER_KEYS = ("raw_text", "text_bert", "audio_lengths", "vision_lengths", "annotations")


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
    if not source.is_pickle:
        return False
    keys = {key for section in source.sections().values() for key in section}
    unlabelled = "labels" not in keys and any(key in keys for key in _OTHER_KEYS)
    return any(key in keys for key in LABEL_KEYS) or (unlabelled and any(key in keys for key in MODALITY_KEYS))


def _read(source: Source) -> MultiModalData:
    path, sections = source.path, source.wanted_sections()
    first = next(iter(sections))
    keys = [key for key in MODALITY_KEYS if key in sections[first]]
    if not keys:
        got = ", ".join(map(str, sections[first]))
        raise DataError(f"{path}: {first}: expected some of {', '.join(MODALITY_KEYS)}; got {got}")
    notes: list[str] = []
    labels, label_names, extras = _labels(path, _labelled(sections, source.needs), notes)
    splits = {}
    for split, section in sections.items():
        samples = SampleCount(labels.get(split))
        features, lengths = {}, {}
        for key in keys:
            name, where = MODALITY_KEYS[key], f"{path}: {split} {key}"
            values = as_features(where, _item(path, split, section, key), samples)
            given = _lengths(path, split, section, key, values.shape)
            features[name], lengths[name] = settle(name, values, given, notes)
        splits[split] = Split(features, lengths, samples.labels, extras.get(split, {}))
    sizes = {MODALITY_KEYS[key]: splits[first].features[MODALITY_KEYS[key]].shape[2] for key in keys}
    return MultiModalData(splits, label_names, sizes, str(path), list(dict.fromkeys(notes)))


def _item(path: Path, split: str, section: dict, key: str, error: type[DataError] = DataError) -> Any:
    if key not in section:
        raise error(f"{path}: {split}: missing key {key}; got {', '.join(map(str, section)) or 'none'}")
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


def _labelled(sections: dict[str, dict], needs: Needs) -> dict[str, dict]:
    """The splits that have labels, or have to."""
    return {s: section for s, section in sections.items() if needs.labels or any(key in section for key in LABEL_KEYS)}


def _labels(
    path: Path, sections: dict[str, dict], notes: list[str]
) -> tuple[dict[str, np.ndarray], list[str], dict[str, dict[str, np.ndarray]]]:
    """By split: (N, K) uint8 and the extras; and the K names, none without a split."""
    if not sections:
        return {}, [], {}
    by_class = all("classification_labels" in section for section in sections.values())
    key = "classification_labels" if by_class else "regression_labels"
    items = {split: _item(path, split, section, key, MissingPart) for split, section in sections.items()}
    values = {split: _column(f"{path}: {split} {key}", item) for split, item in items.items()}
    extras: dict[str, dict[str, np.ndarray]] = {}
    for split, section in sections.items():
        sentiment = section.get("regression_labels")
        extras[split] = {}
        if sentiment is not None:
            where = f"{path}: {split} regression_labels"
            extras[split]["sentiment"] = narrow(_column(where, sentiment, len(values[split])))
    if not by_class:
        notes.append(SENTIMENT_NOTE)
        return {split: sentiment_classes(x) for split, x in values.items()}, list(SENTIMENT), extras
    classes = sorted({x for numbers in values.values() for x in numbers.tolist()})
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
    for split, numbers in values.items():
        annotations = sections[split].get("annotations")
        if not isinstance(annotations, (list, tuple, np.ndarray)) or len(annotations) != len(numbers):
            return [f"class_{x:g}" for x in classes]
        for number, annotation in zip(numbers.tolist(), annotations, strict=True):
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

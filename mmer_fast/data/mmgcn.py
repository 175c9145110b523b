"""The pickles of MMGCN: IEMOCAP as a tuple of nine, MELD as a tuple of ten (Python 2 or 3).

    videoIDs, videoSpeakers, videoLabels, videoText, videoAudio, videoVisual, videoSentence, trainVid, testVid[, more]

The first seven map a dialogue's id to its utterances: ids, speakers, class numbers, then one feature vector an
utterance and modality; the last two list dialogues. An utterance is a sample here, a sequence of one step; the
extras ``dialogue`` and ``position`` say where it belongs. Its class is one column of the labels: hap, sad, neu,
ang, exc, fru in IEMOCAP (six classes), neutral, surprise, fear, sadness, joy, disgust, anger in MELD (seven).
The layout has no validation split: the last tenth of the training dialogues becomes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.errors import DataError
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.labels import IEMOCAP_SIX, numbered, one_hot
from mmer_fast.data.sequences import describe, settle
from mmer_fast.data.writing import require_emotions, require_modalities, write_pickle

PARTS = (
    "videoIDs",
    "videoSpeakers",
    "videoLabels",
    "videoText",
    "videoAudio",
    "videoVisual",
    "videoSentence",
    "trainVid",
    "testVid",
)
FEATURES = {"videoText": "text", "videoVisual": "video", "videoAudio": "audio"}
LABELS = {
    6: IEMOCAP_SIX,
    7: ["neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"],
}
_CLASS_OF_EMOTION = [4, 3, 6, 1, 5, 2]  # MELD's class of happy, sad, anger, surprise, disgust, fear
_WRITTEN_DIALOGUE = 10  # utterances


def read_mmgcn(path: str | Path) -> MultiModalData:
    """Read a pickle of MMGCN; nothing in it is executed (see `safe_pickle`).

    Raises:
        DataError: naming the part, dialogue and utterance, what was expected and what came.
    """
    return _read(Source(path)).check()


def write_mmgcn(data: MultiModalData, path: str | Path) -> None:
    """Write text, video and audio in MELD's layout, whole or not at all.

    The format holds less: a sequence becomes its mean vector (zeros where it is missing), and of several
    emotions the first is kept. Validation dialogues come last in ``trainVid``.

    Raises:
        DataError: other modalities or labels.
    """
    require_modalities("an MMGCN file", data, ("text", "video", "audio"))
    require_emotions("an MMGCN file", data)
    parts: list[dict[str, Any]] = [{} for _ in range(7)]
    lists: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for name, split in data.splits.items():
        means = {
            m: split.features[m].sum(axis=1) / np.maximum(split.lengths[m], 1)[:, None].astype(np.float32)
            for m in data.modalities
        }
        classes = np.where(split.labels.any(axis=1), np.array(_CLASS_OF_EMOTION)[split.labels.argmax(axis=1)], 0)
        for start in range(0, len(split), _WRITTEN_DIALOGUE):
            dialogue, rows = f"{name}_{start // _WRITTEN_DIALOGUE:05d}", slice(start, start + _WRITTEN_DIALOGUE)
            count = len(classes[rows])
            lists[name].append(dialogue)
            parts[0][dialogue] = [f"{dialogue}_{i}" for i in range(count)]
            parts[1][dialogue] = [[1] + [0] * 8] * count
            parts[2][dialogue] = classes[rows].tolist()
            for part, modality in zip((3, 4, 5), ("text", "audio", "video"), strict=True):
                parts[part][dialogue] = list(means[modality][rows])
            parts[6][dialogue] = [""] * count
    write_pickle(Path(path), (*parts, lists["train"] + lists["valid"], lists["test"], {}), protocol=2)


def _detect(source: Source) -> bool:
    return source.is_pickle and isinstance(source.content, (tuple, list))


def _read(source: Source) -> MultiModalData:
    path, content = source.path, source.content
    if not isinstance(content, (tuple, list)) or len(content) not in (9, 10):
        raise DataError(f"{path}: expected a tuple of 9 ({', '.join(PARTS)}) or 10; got {describe(content)}")
    parts = dict(zip(PARTS, content, strict=False))
    for name in PARTS[:7]:
        if not isinstance(parts[name], dict):
            raise DataError(f"{path}: {name}: expected a dict of dialogues; got {describe(parts[name])}")
    notes: list[str] = []
    train, test = _dialogues(path, "trainVid", parts), _dialogues(path, "testVid", parts)
    held_out = max(1, len(train) // 10)
    if len(train) < 2:
        raise DataError(
            f"{path}: trainVid: expected two dialogues or more, one of them for validation; got {len(train)}"
        )
    notes.append(f"the file has no validation split: the last {held_out} of {len(train)} training dialogues are it")
    chosen = {"train": train[:-held_out], "valid": train[-held_out:], "test": test}
    classes = {s: _classes(path, dialogues, parts["videoLabels"]) for s, dialogues in chosen.items()}
    count = _class_count(path, len(content), classes)
    splits = {}
    for split in chosen:
        labels = one_hot(f"{path}: videoLabels", np.concatenate([*classes[split].values()]), count)
        splits[split] = _split(path, parts, classes[split], labels, notes)
    names = LABELS.get(count) or numbered(count, notes)
    sizes = {name: splits["train"].features[name].shape[2] for name in FEATURES.values()}
    return MultiModalData(splits, list(names), sizes, str(path), list(dict.fromkeys(notes)))


def _dialogues(path: Path, name: str, parts: dict[str, Any]) -> list:
    """Dialogue ids in the file's order; those of a set sorted, since a set has none."""
    ids = parts[name]
    if not isinstance(ids, (list, tuple, set)) or not all(isinstance(x, (str, int)) for x in ids) or not ids:
        raise DataError(f"{path}: {name}: expected a list of dialogue ids; got {describe(ids)}")
    unknown = [x for x in ids if x not in parts["videoLabels"]]
    if unknown:
        raise DataError(f"{path}: {name}: dialogue {str(unknown[0])[:80]!r} is not in videoLabels")
    return sorted(ids, key=lambda x: (str(x), isinstance(x, int))) if isinstance(ids, set) else list(dict.fromkeys(ids))


def _classes(path: Path, dialogues: list, labels: dict) -> dict[Any, np.ndarray]:
    """(L,) class numbers of each dialogue; dialogues without an utterance are left out."""
    result = {}
    for dialogue in dialogues:
        values = labels[dialogue]
        if isinstance(values, (list, tuple)) and all(type(x) is int for x in values):
            values = np.array(values, dtype=np.float64)
        if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "iuf":
            where = f"{path}: videoLabels of {str(dialogue)[:80]!r}"
            raise DataError(f"{where}: expected a list of class numbers; got {describe(values)}")
        if len(values):
            result[dialogue] = values.astype(np.float64)
    if not result:
        raise DataError(f"{path}: videoLabels: expected an utterance in every split; got none")
    return result


def _class_count(path: Path, parts: int, classes: dict[str, dict[Any, np.ndarray]]) -> int:
    largest = max(float(values.max()) for by_dialogue in classes.values() for values in by_dialogue.values())
    if not 0 <= largest < 100:
        raise DataError(f"{path}: videoLabels: expected class numbers from 0 to 99; got {largest:g}")
    return max(int(largest) + 1, 6 if parts == 9 else 7)


def _split(
    path: Path, parts: dict[str, Any], classes: dict[Any, np.ndarray], labels: np.ndarray, notes: list[str]
) -> Split:
    features, lengths = {}, {}
    for part, name in FEATURES.items():
        rows = [_vectors(path, part, parts[part], dialogue, len(values)) for dialogue, values in classes.items()]
        size = rows[0].shape[1]
        for dialogue, row in zip(classes, rows, strict=True):
            if row.shape[1] != size:
                where = f"{path}: {part} of {str(dialogue)[:80]!r}"
                raise DataError(f"{where}: expected {size} features; got {row.shape[1]}")
        features[name], lengths[name] = settle(name, np.concatenate(rows)[:, None, :], None, notes)
    counts = [len(values) for values in classes.values()]
    position = np.concatenate([np.arange(count) for count in counts])
    extras = {"dialogue": np.repeat(np.arange(len(counts)), counts), "position": position}
    return Split(features, lengths, labels, extras)


def _vectors(path: Path, part: str, by_dialogue: dict, dialogue: Any, count: int) -> np.ndarray:
    """(L, D) float32 vectors of a dialogue's utterances."""
    value = by_dialogue.get(dialogue)
    where = f"{path}: {part} of {str(dialogue)[:80]!r}"
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise DataError(f"{where}: expected {count} vectors; got {describe(value)}")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise DataError(f"{where}: expected {count} vectors of one size; got {describe(value)}") from None
    if array.ndim != 2 or len(array) != count or array.shape[1] == 0:
        raise DataError(f"{where}: expected {count} vectors, as many as labels; got {describe(array)}")
    return array


FORMAT = Format(
    name="mmgcn",
    title="a .pkl of MMGCN (tuple of 9 or 10)",
    detect=_detect,
    read=_read,
    write=lambda data, path: write_mmgcn(data, path),
    suffix=".pkl",
)

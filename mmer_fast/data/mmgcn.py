"""The pickles of MMGCN: IEMOCAP as a tuple of nine, MELD as a tuple of ten (Python 2 or 3).

    videoIDs, videoSpeakers, videoLabels, videoText, videoAudio, videoVisual, videoSentence, trainVid, testVid[, more]

The first seven map a dialogue's id to its utterances: ids, speakers, class numbers, then one feature vector an
utterance and modality; the last two list dialogues. An utterance is a sample here, a sequence of one step; the
extras ``dialogue`` and ``position`` say where it belongs, ``speaker`` whose it is: 0 for "M" and 1 for "F" in IEMOCAP,
the place of the 1 among nine in MELD. Its class is one column of the labels: hap, sad, neu, ang, exc, fru in IEMOCAP
(six classes), neutral, surprise, fear, sadness, joy, disgust, anger in MELD (seven).
The layout has no validation split: the last tenth of the training dialogues becomes it. For prediction one of the two
lists may be empty, and ``videoLabels`` need not hold the dialogues of a split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast.data.containers import MultiModalData, Split, no_labels
from mmer_fast.data.errors import DataError, MissingPart
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.labels import IEMOCAP_SIX, numbered, one_hot
from mmer_fast.data.needs import Needs
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
_WRITTEN_DIALOGUE = 10  # utterances, where the data have no dialogues
_SEXES = ["M", "F"]
_MELD_SPEAKERS = 9


def write_mmgcn(data: MultiModalData, path: str | Path) -> None:
    """Write text, video and audio, whole or not at all.

    The layout is IEMOCAP's where the labels are its six classes, else MELD's. The format holds less: a sequence becomes
    its mean vector (zeros where it is missing), and of several emotions the first is kept. Validation dialogues come
    last in ``trainVid``. Without the extras ``dialogue`` and ``speaker``, every ten samples are a dialogue, all of one
    speaker.

    Raises:
        DataError: other modalities or labels.
    """
    require_modalities("an MMGCN file", data, ("text", "video", "audio"))
    if data.label_names not in LABELS.values():
        require_emotions("an MMGCN file", data)
    parts: list[dict[str, Any]] = [{} for _ in range(7)]
    lists: dict[str, list[str]] = {}
    for name, split in data.splits.items():
        lists[name] = _write_split(name, split, data.label_names, parts)
    rest: tuple = () if data.label_names == LABELS[6] else ({},)
    write_pickle(Path(path), (*parts, lists["train"] + lists["valid"], lists["test"], *rest), protocol=2)


def _write_split(name: str, split: Split, label_names: list[str], parts: list[dict[str, Any]]) -> list[str]:
    """Add the dialogues of a split to the first seven parts; their ids."""
    vectors = [
        split.features[m].sum(axis=1) / np.maximum(split.lengths[m], 1)[:, None].astype(np.float32)
        for m in ("text", "audio", "video")
    ]
    classes = split.labels.argmax(axis=1)
    if label_names not in LABELS.values():
        classes = np.where(split.labels.any(axis=1), np.array(_CLASS_OF_EMOTION)[classes], 0)
    dialogues = split.extras.get("dialogue", np.arange(len(split)) // _WRITTEN_DIALOGUE)
    speakers = _written_speakers(split.extras.get("speaker", np.zeros(len(split), dtype=np.int64)), label_names)
    ids = []
    for number in dict.fromkeys(dialogues.tolist()):
        dialogue, rows = f"{name}_{number:05d}", np.flatnonzero(dialogues == number)
        ids.append(dialogue)
        parts[0][dialogue] = [f"{dialogue}_{i}" for i in range(len(rows))]
        parts[1][dialogue] = [speakers[row] for row in rows]
        parts[2][dialogue] = classes[rows].tolist()
        for part, vectors_nd in zip(parts[3:6], vectors, strict=True):
            part[dialogue] = list(vectors_nd[rows])
        parts[6][dialogue] = [""] * len(rows)
    return ids


def _written_speakers(speaker_n: np.ndarray, label_names: list[str]) -> list:
    """IEMOCAP's "M" and "F" where its labels and two speakers allow, else MELD's rows of 0 and a 1."""
    most = int(speaker_n.max())
    if label_names == LABELS[6] and most < len(_SEXES):
        return [_SEXES[speaker] for speaker in speaker_n]
    return np.eye(max(most + 1, _MELD_SPEAKERS), dtype=np.int64)[speaker_n].tolist()


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
    chosen = _chosen(path, parts, source.needs, notes)
    known = {s: ids for s, ids in chosen.items() if source.needs.labels or any(d in parts["videoLabels"] for d in ids)}
    classes = {split: _classes(path, ids, parts["videoLabels"]) for split, ids in known.items()}
    count = _class_count(path, len(content), classes) if classes else 0
    splits = {}
    for split, ids in chosen.items():
        if split in classes:
            utterances = {dialogue: len(values) for dialogue, values in classes[split].items()}
            labels = one_hot(f"{path}: videoLabels", np.concatenate([*classes[split].values()]), count)
        else:
            utterances = _utterances(path, ids, parts["videoText"])
            labels = no_labels(sum(utterances.values()))
        splits[split] = _split(path, parts, utterances, labels, notes)
    names = (LABELS.get(count) or numbered(count, notes)) if classes else []
    first = next(iter(splits.values()))
    sizes = {name: first.features[name].shape[2] for name in FEATURES.values()}
    return MultiModalData(splits, list(names), sizes, str(path), list(dict.fromkeys(notes)))


def _chosen(path: Path, parts: dict[str, Any], needs: Needs, notes: list[str]) -> dict[str, list]:
    """The dialogues of each split that the file has or has to have."""
    of_list = {"trainVid": ("train", "valid"), "testVid": ("test",)}
    there = {split for name, splits in of_list.items() if not _is_empty(parts[name]) for split in splits}
    wanted = needs.wanted(there)
    chosen = {}
    if "train" in wanted or "valid" in wanted:
        train = _dialogues(path, "trainVid", parts, needs)
        held_out = max(1, len(train) // 10)
        if len(train) < 2:
            raise DataError(
                f"{path}: trainVid: expected two dialogues or more, one of them for validation; got {len(train)}"
            )
        notes.append(f"the file has no validation split: the last {held_out} of {len(train)} training dialogues are it")
        chosen = {"train": train[:-held_out], "valid": train[-held_out:]}
    if "test" in wanted:
        chosen["test"] = _dialogues(path, "testVid", parts, needs)
    return chosen


def _is_empty(ids: Any) -> bool:
    return isinstance(ids, (list, tuple, set)) and not ids


def _dialogues(path: Path, name: str, parts: dict[str, Any], needs: Needs) -> list:
    """Dialogue ids in the file's order; those of a set sorted, since a set has none."""
    ids = parts[name]
    if not isinstance(ids, (list, tuple, set)) or not all(isinstance(x, (str, int)) for x in ids) or not ids:
        kind = MissingPart if _is_empty(ids) else DataError
        raise kind(f"{path}: {name}: expected a list of dialogue ids; got {describe(ids)}")
    part, error = ("videoLabels", MissingPart) if needs.labels else ("videoText", DataError)
    unknown = [x for x in ids if x not in parts[part]]
    if unknown:
        raise error(f"{path}: {name}: dialogue {str(unknown[0])[:80]!r} is not in {part}")
    return sorted(ids, key=lambda x: (str(x), isinstance(x, int))) if isinstance(ids, set) else list(dict.fromkeys(ids))


def _utterances(path: Path, dialogues: list, texts: dict) -> dict[Any, int]:
    """How many utterances each dialogue without labels has; dialogues without one are left out."""
    result = {}
    for dialogue in dialogues:
        value = texts[dialogue]
        if not isinstance(value, (list, tuple, np.ndarray)):
            where = f"{path}: videoText of {str(dialogue)[:80]!r}"
            raise DataError(f"{where}: expected a vector an utterance; got {describe(value)}")
        if len(value):
            result[dialogue] = len(value)
    if not result:
        raise DataError(f"{path}: videoText: expected an utterance in every split; got none")
    return result


def _classes(path: Path, dialogues: list, labels: dict) -> dict[Any, np.ndarray]:
    """(L,) class numbers of each dialogue; dialogues without an utterance are left out."""
    result = {}
    for dialogue in dialogues:
        if dialogue not in labels:
            raise DataError(f"{path}: videoLabels: dialogue {str(dialogue)[:80]!r} of a split with labels has none")
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
    path: Path, parts: dict[str, Any], utterances: dict[Any, int], labels: np.ndarray, notes: list[str]
) -> Split:
    """The samples of dialogues, of which ``utterances`` says how many each has."""
    features, lengths = {}, {}
    for part, name in FEATURES.items():
        rows = [_vectors(path, part, parts[part], dialogue, count) for dialogue, count in utterances.items()]
        size = rows[0].shape[1]
        for dialogue, row in zip(utterances, rows, strict=True):
            if row.shape[1] != size:
                where = f"{path}: {part} of {str(dialogue)[:80]!r}"
                raise DataError(f"{where}: expected {size} features; got {row.shape[1]}")
        features[name], lengths[name] = settle(name, np.concatenate(rows)[:, None, :], None, notes)
    counts = list(utterances.values())
    speakers = [_speakers(path, parts["videoSpeakers"], dialogue, count) for dialogue, count in utterances.items()]
    position = np.concatenate([np.arange(count) for count in counts])
    extras = {"dialogue": np.repeat(np.arange(len(counts)), counts), "position": position}
    extras["speaker"] = np.concatenate(speakers)
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


def _speakers(path: Path, by_dialogue: dict, dialogue: Any, count: int) -> np.ndarray:
    """(L,) int64 numbers of the speakers of a dialogue's utterances."""
    value = by_dialogue.get(dialogue)
    where = f"{path}: videoSpeakers of {str(dialogue)[:80]!r}"
    expected = f"{where}: expected {count} speakers, each {' or '.join(_SEXES)} or a row of 0 and one 1"
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != count:
        raise DataError(f"{expected}; got {describe(value)}")
    if all(isinstance(speaker, str) for speaker in value):
        unknown = [speaker for speaker in value if speaker not in _SEXES]
        if unknown:
            raise DataError(f"{expected}; got {unknown[0][:80]!r}")
        return np.array([_SEXES.index(speaker) for speaker in value], dtype=np.int64)
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{expected}; got {describe(value)}") from None
    if array.ndim != 2 or not np.isin(array, (0, 1)).all() or not (array.sum(axis=1) == 1).all():
        raise DataError(f"{expected}; got {describe(array)}")
    return array.argmax(axis=1).astype(np.int64)


FORMAT = Format(
    name="mmgcn",
    title="a .pkl of MMGCN (tuple of 9 or 10)",
    detect=_detect,
    read=_read,
    write=lambda data, path: write_mmgcn(data, path),
    suffix=".pkl",
)

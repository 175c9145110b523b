"""``train_valid_test.pt`` as TAILOR, MMER, HHMPN and NEMu use it.

    [split]["src-text" | "src-visual" | "src-audio"]    N samples, each (T, D)     TAILOR, MMER, HHMPN
    [split]["lyr" | "com" | "img" | "aud"]              N samples, each (T, D)     NEMu
    [split]["tgt"]                                      N lists [BOS, ids..., EOS]
    ["settings"], ["dict"]                              HHMPN only

with split one of train, valid, test. The vocabulary of ``tgt`` begins with four special ids (padding 0,
unknown 1, BOS 2, EOS 3); id 4 + k stands for label k. Samples are tensors, arrays, or rows of one stacked
array; a sample of shape (D,) counts as a single time step. For prediction a split, or its ``tgt``, may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmer_fast._files import write_atomically
from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.errors import DataError, MissingPart
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.labels import EMOTIONS, numbered
from mmer_fast.data.needs import SPLITS, Needs
from mmer_fast.data.safe_load import load_plain
from mmer_fast.data.sequences import SampleCount, describe, pad
from mmer_fast.data.writing import require_labels

PAD, BOS, EOS, FIRST_LABEL = 0, 2, 3, 4
MODALITY_KEYS = {
    "src-text": "text",
    "src-visual": "video",
    "src-audio": "audio",
    "lyr": "lyrics",
    "com": "comments",
    "img": "image",
    "aud": "audio",
}
MOSEI_KEYS = {"src-text", "src-visual", "src-audio"}
MOSEI_LABELS = EMOTIONS
SPECIAL = {"<blank>": PAD, "<unk>": 1, "<s>": BOS, "</s>": EOS}


def read_tailor_pt(path: str | Path) -> MultiModalData:
    """Read a TAILOR/MMER ``.pt`` file; nothing in it is executed (see `safe_load`).

    Modalities are named text, video, audio (or lyrics, comments, image, audio). The number of labels is that
    of the file's ``dict``, else it follows from the largest id of all splits. -inf in audio features becomes
    0, with a note.

    Raises:
        DataError: naming the split, key and sample, what was expected and what came.
    """
    return _read(Source(path)).check()


def write_tailor_pt(data: MultiModalData, path: str | Path) -> None:
    """Write the layout of TAILOR and MMER (or NEMu, for its modalities), whole or not at all.

    Label names go into ``dict`` unless they are the six of CMU-MOSEI, which readers of the layout know. Lengths
    are left to be derived from all-zero rows, and extras are left out.

    Raises:
        DataError: a modality is none of the layout's, or a split has no labels.
    """
    require_labels("TAILOR .pt", data)
    keys = {name: key for key, name in reversed(MODALITY_KEYS.items())}
    unknown = [name for name in data.modalities if name not in keys]
    if unknown:
        raise DataError(f"TAILOR .pt holds the modalities {', '.join(keys)}; got {', '.join(unknown)}")
    content: dict[str, Any] = {}
    for name, split in data.splits.items():
        content[name] = {keys[modality]: list(split.features[modality]) for modality in data.modalities}
        content[name]["tgt"] = [[BOS, *(np.flatnonzero(row) + FIRST_LABEL).tolist(), EOS] for row in split.labels]
    if data.label_names != MOSEI_LABELS or {keys[name] for name in data.modalities} != MOSEI_KEYS:
        ids = {name: FIRST_LABEL + k for k, name in enumerate(data.label_names)}
        content["dict"] = {"tgt": SPECIAL | ids}
    write_atomically(Path(path), lambda partial: torch.save(content, partial))


def _read(source: Source) -> MultiModalData:
    path = source.path
    content = load_plain(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a dict of {', '.join(SPLITS)}; got {type(content).__name__}")
    wanted = source.needs.wanted(content)
    raw = {split: _section(path, content, split, wanted[0], source.needs) for split in wanted}
    keys = [key for key in MODALITY_KEYS if key in raw[wanted[0]]]
    labelled = [split for split in wanted if "tgt" in raw[split]]
    ids = {split: _target_ids(f"{path}: {split} tgt", raw[split]["tgt"]) for split in labelled}
    notes: list[str] = []
    label_names = _label_names(path, content.get("dict"), ids, set(keys), notes)
    splits = {}
    for split in wanted:
        labels = _multi_hot(f"{path}: {split} tgt", ids[split], len(label_names)) if split in ids else None
        samples = SampleCount(labels, "tgt")
        features, lengths = {}, {}
        for key in keys:
            name = MODALITY_KEYS[key]
            where = f"{path}: {split} {key}"
            features[name], lengths[name] = _modality(where, raw[split][key], samples, name, notes)
        splits[split] = Split(features, lengths, samples.labels)
    sizes = {MODALITY_KEYS[key]: splits[wanted[0]].features[MODALITY_KEYS[key]].shape[2] for key in keys}
    return MultiModalData(splits, label_names, sizes, str(path), list(dict.fromkeys(notes)))


def _section(path: Path, content: dict, split: str, first: str, needs: Needs) -> dict:
    """A split of the file, over the modalities of its first one."""
    if split not in content:
        got = ", ".join(map(str, content)) or "none"
        splits = ", ".join(needs.splits or SPLITS)
        raise MissingPart(f"{path}: missing split {split}; expected {splits}; got keys {got}")
    section = content[split]
    if not isinstance(section, dict):
        raise DataError(f"{path}: {split}: expected a dict; got {type(section).__name__}")
    if needs.labels and "tgt" not in section:
        raise MissingPart(f"{path}: {split}: missing key tgt; got {', '.join(map(str, section)) or 'none'}")
    modalities = {key for key in section if key in MODALITY_KEYS}
    expected = {key for key in content[first] if key in MODALITY_KEYS} if split != first else modalities
    if not modalities:
        raise DataError(
            f"{path}: {split}: expected some of {', '.join(MODALITY_KEYS)}; got {', '.join(map(str, section))}"
        )
    if modalities != expected:
        odd = ", ".join(sorted(modalities ^ expected))
        raise DataError(f"{path}: {split}: expected the modalities of {first}; they differ in {odd}")
    if {"src-audio", "aud"} <= modalities:
        raise DataError(f"{path}: {split}: expected one of src-audio and aud; got both")
    return section


def _target_ids(where: str, targets: Any) -> list[list[int]]:
    """Each sample's label ids, special ids removed."""
    if not isinstance(targets, (Sequence, np.ndarray)) or isinstance(targets, (str, bytes)) or len(targets) == 0:
        raise DataError(f"{where}: expected a non-empty list of [BOS, ids..., EOS]; got {type(targets).__name__}")
    result = []
    for i, target in enumerate(targets):
        row = target.tolist() if isinstance(target, np.ndarray) else target
        if not isinstance(row, (list, tuple)) or not all(type(x) is int for x in row):
            raise DataError(f"{where}: sample {i}: expected a list of integers; got {target!r}")
        row = list(row)
        while row and row[-1] == PAD:
            row.pop()
        labels = row[1:-1]
        framed = len(row) >= 2 and row[0] == BOS and row[-1] == EOS
        if not framed or any(x < FIRST_LABEL for x in labels) or len(set(labels)) != len(labels):
            raise DataError(
                f"{where}: sample {i}: expected [{BOS}, distinct ids >= {FIRST_LABEL}..., {EOS}]; got {list(target)}"
            )
        result.append(labels)
    return result


def _label_names(
    path: Path, vocabulary: Any, ids: dict[str, list[list[int]]], keys: set[str], notes: list[str]
) -> list[str]:
    """The names of the labels; without a vocabulary and labels there are none."""
    if not ids:
        return [] if vocabulary is None else _vocabulary_names(path, vocabulary)
    largest = max((x for rows in ids.values() for row in rows for x in row), default=FIRST_LABEL - 1)
    if largest < FIRST_LABEL:
        raise DataError(f"{path}: tgt: expected at least one label in some sample; got none")
    count = largest - FIRST_LABEL + 1
    if vocabulary is not None:
        return _vocabulary_names(path, vocabulary)
    if count == len(MOSEI_LABELS) and keys == MOSEI_KEYS:
        return list(MOSEI_LABELS)
    return numbered(count, notes)


def _vocabulary_names(path: Path, vocabulary: Any) -> list[str]:
    """Label names in id order from HHMPN's ``dict``: name -> id, or the same under its key ``tgt``."""
    if isinstance(vocabulary, Mapping) and isinstance(vocabulary.get("tgt"), Mapping):
        vocabulary = vocabulary["tgt"]
    if not isinstance(vocabulary, Mapping) or not all(type(x) is int for x in vocabulary.values()):
        raise DataError(f"{path}: dict: expected a mapping from label name to id; got {type(vocabulary).__name__}")
    names = {i: str(name) for name, i in vocabulary.items() if i >= FIRST_LABEL}
    expected = list(range(FIRST_LABEL, FIRST_LABEL + len(names)))
    if not names or sorted(names) != expected:
        raise DataError(f"{path}: dict: expected label ids {FIRST_LABEL}, {FIRST_LABEL + 1}, ...; got {sorted(names)}")
    return [names[i] for i in expected]


def _multi_hot(where: str, ids: list[list[int]], n_labels: int) -> np.ndarray:
    labels_nk = np.zeros((len(ids), n_labels), dtype=np.uint8)
    for i, row in enumerate(ids):
        if row and max(row) >= FIRST_LABEL + n_labels:
            raise DataError(
                f"{where}: sample {i}: expected ids below {FIRST_LABEL + n_labels} ({n_labels} labels); got {max(row)}"
            )
        labels_nk[i, [x - FIRST_LABEL for x in row]] = 1
    return labels_nk


def _modality(
    where: str, samples: Any, count: SampleCount, name: str, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    rows = _sample_arrays(where, samples, count)
    return pad(name, [row.shape for row in rows], rows, notes)


def _sample_arrays(where: str, samples: Any, count: SampleCount) -> list[np.ndarray]:
    """The samples as (T, D) float arrays of one D; T may differ."""
    if not isinstance(samples, (list, tuple, np.ndarray)):
        raise DataError(f"{where}: expected a list of arrays or one stacked array; got {type(samples).__name__}")
    count.hold(where, samples)
    rows = []
    for i, sample in enumerate(samples):
        if not isinstance(sample, np.ndarray) or sample.ndim not in (1, 2) or sample.dtype.kind != "f":
            raise DataError(f"{where}: sample {i}: expected (T, D) floats; got {describe(sample)}")
        rows.append(np.atleast_2d(sample))
        if rows[-1].shape[1] == 0:
            raise DataError(f"{where}: sample {i}: expected (T, D >= 1) floats; got shape {sample.shape}")
        if rows[-1].shape[1] != rows[0].shape[1]:
            raise DataError(f"{where}: sample {i}: expected {rows[0].shape[1]} features; got {rows[-1].shape[1]}")
    return rows


FORMAT = Format(
    name="tailor",
    title="train_valid_test.pt of TAILOR, MMER, HHMPN or NEMu",
    detect=lambda source: source.suffix in (".pt", ".pth"),
    read=_read,
    write=lambda data, path: write_tailor_pt(data, path),
    suffix=".pt",
)

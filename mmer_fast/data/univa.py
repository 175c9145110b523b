"""The set of pickles that UniVA trains on: a folder, with or without its subfolders ``T``, ``A`` and ``V``.

    {DATASET}_{split}_audio_utt_VA.pkl       [split]["audio" | "audio_utt_mask" | "audio_VA_values" | "labels_class"],
                                             ["num_labels"]
    {DATASET}_{split}_vision_utt_VA.pkl      the same with vision
    {DATASET}_{split}_text_glove300_VA.pkl   ["text" | "text_utt_mask" | "text_VA_values"]

with split one of train, valid, test. Features are (N, T, D), masks (N, T) with 1 on the steps that exist, VA
values (N, 2), kept as extras ``va_{modality}``; ``labels_class`` is (N, K) of 0 and 1. Audio or vision must be
there, for the labels. ``vision`` is called video; labels are numbered, since the files do not name them. For
prediction the files of a split, or ``labels_class``, may be missing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast._files import write_folder_atomically
from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.errors import DataError, MissingPart
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.labels import as_numbers, narrow, numbered
from mmer_fast.data.needs import SPLITS, Needs
from mmer_fast.data.safe_pickle import load_pickle
from mmer_fast.data.sequences import SampleCount, as_features, describe, settle
from mmer_fast.data.writing import require_modalities, write_pickle

FILE = re.compile(r"(?P<dataset>.+)_(?P<split>train|valid|test)_(?P<kind>(audio|vision)_utt|text_glove300)_VA\.pkl")
MODALITIES = {"text_glove300": "text", "vision_utt": "video", "audio_utt": "audio"}
SUBFOLDERS = {"text": "T", "video": "V", "audio": "A"}


def write_univa(data: MultiModalData, path: str | Path) -> None:
    """Write text, video and audio as a new folder, whole or not at all; VA values are the extras ``va_{modality}``,
    zeros where there are none. Label names and other extras are left out.

    Raises:
        DataError: other modalities, or the folder exists.
    """
    require_modalities("UniVA's set", data, ("text", "video", "audio"))

    def write(folder: Path) -> None:
        for modality in data.modalities:
            (folder / SUBFOLDERS[modality]).mkdir()
        for name, split in data.splits.items():
            for kind, modality in MODALITIES.items():
                file = folder / SUBFOLDERS[modality] / f"SYNTHETIC_{name}_{kind}_VA.pkl"
                write_pickle(file, _file_content(name, split, kind.partition("_")[0], modality))

    write_folder_atomically(Path(path), write)


def _file_content(name: str, split: Split, key: str, modality: str) -> dict:
    features = split.features[modality]
    content = {
        key: features,
        f"{key}_utt_mask": (np.arange(features.shape[1]) < split.lengths[modality][:, None]).astype(np.float32),
        f"{key}_VA_values": split.extras.get(f"va_{modality}", np.zeros((len(split), 2))).tolist(),
    }
    if key == "text":
        return content
    content["labels_class"] = split.labels.astype(np.int64)
    return {name: content, "num_labels": split.labels.shape[1]}


def _detect(source: Source) -> bool:
    return bool(_files(source.path))


def _files(path: Path) -> list[Path]:
    """The files of the set that ``path`` names: a folder, or one of its files."""
    if path.is_file():
        if not FILE.fullmatch(path.name):
            return []
        path = path.parent.parent if path.parent.name in SUBFOLDERS.values() else path.parent
    folders = [path, *(path / name for name in SUBFOLDERS.values())]
    files = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    return sorted(file for file in files if FILE.fullmatch(file.name) and file.is_file())


def _read(source: Source) -> MultiModalData:
    path = source.path
    found: dict[tuple[str, str], Path] = {}
    datasets = set()
    for file in _files(path):
        match = FILE.fullmatch(file.name)
        assert match
        datasets.add(match["dataset"])
        found[match["split"], MODALITIES[match["kind"]]] = file
    if len(datasets) != 1:
        raise DataError(f"{path}: expected the files of one data set; got {', '.join(sorted(datasets)) or 'none'}")
    modalities = [name for name in MODALITIES.values() if any((split, name) in found for split in SPLITS)]
    wanted = source.needs.wanted({split for split, _ in found})
    missing = [(split, name) for split in wanted for name in modalities if (split, name) not in found]
    if missing:
        split, name = missing[0]
        error = DataError if any((split, other) in found for other in modalities) else MissingPart
        raise error(f"{path}: expected the modalities {', '.join(modalities)} in every split; missing {split} {name}")
    if source.needs.labels and modalities == ["text"]:
        raise MissingPart(f"{path}: expected audio or vision files beside those of text; they hold the labels")
    notes: list[str] = []
    splits = {
        split: _read_split(split, {m: found[split, m] for m in modalities}, source.needs, notes) for split in wanted
    }
    sizes = {name: splits[wanted[0]].features[name].shape[2] for name in modalities}
    labelled = [split.labels for split in splits.values() if split.labelled]
    names = numbered(labelled[0].shape[1], notes) if labelled else []
    return MultiModalData(splits, names, sizes, str(path), list(dict.fromkeys(notes)))


def _read_split(split: str, files: dict[str, Path], needs: Needs, notes: list[str]) -> Split:
    contents = {name: load_pickle(file) for name, file in files.items()}
    samples = SampleCount(_common_labels(split, files, contents, needs), "labels_class")
    features, lengths, extras = {}, {}, {}
    for name, file in files.items():
        key = {"video": "vision"}.get(name, name)
        section = contents[name] if name == "text" else _item(file, contents[name], split)
        values = as_features(f"{file}: {key}", _item(file, section, key), samples)
        mask = _item(file, section, f"{key}_utt_mask")
        values, given = _by_mask(f"{file}: {key}_utt_mask", values, mask)
        features[name], lengths[name] = settle(name, values, given, notes)
        if f"{key}_VA_values" in section:
            va = as_numbers(f"{file}: {key}_VA_values", section[f"{key}_VA_values"], len(values))
            extras[f"va_{name}"] = narrow(va)
    return Split(features, lengths, samples.labels, extras)


def _common_labels(split: str, files: dict[str, Path], contents: dict[str, Any], needs: Needs) -> np.ndarray | None:
    """The labels in the files of audio and video, the same in both; None where they have none and need none."""
    holders = [name for name in files if name != "text"]
    sections = [_item(files[name], contents[name], split) for name in holders]
    if not needs.labels and not any(isinstance(section, dict) and "labels_class" in section for section in sections):
        return None
    labels: np.ndarray | None = None
    for name in holders:
        these = _labels(files[name], split, contents[name])
        if labels is not None and not np.array_equal(labels, these):
            raise DataError(f"{files[name]}: {split} labels_class: expected the labels of the other modality's file")
        labels = these
    return labels


def _item(file: Path, section: Any, key: str, error: type[DataError] = DataError) -> Any:
    if not isinstance(section, dict):
        raise DataError(f"{file}: expected a dict with {key}; got {describe(section)}")
    if key not in section:
        raise error(f"{file}: missing key {key}; got {', '.join(map(str, section)) or 'none'}")
    return section[key]


def _labels(file: Path, split: str, content: Any) -> np.ndarray:
    where = f"{file}: {split} labels_class"
    values = as_numbers(where, _item(file, _item(file, content, split), "labels_class", MissingPart))
    if values.ndim != 2 or ((values != 0) & (values != 1)).any():
        raise DataError(f"{where}: expected (N, K) of 0 and 1; got {describe(values)}")
    count = content.get("num_labels", values.shape[1])
    if not isinstance(count, (int, float)) or count != values.shape[1]:
        raise DataError(
            f"{file}: num_labels: expected {values.shape[1]}, the columns of labels_class; got {str(count)[:40]}"
        )
    return values.astype(np.uint8)


@np.errstate(invalid="ignore")
def _by_mask(where: str, values_ntd: np.ndarray, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features and lengths from a mask of ones in front, or at the end where padding is in front.

    A value where the mask is 0 is refused: it would mean that the mask says something else than expected.
    """
    mask_nt = as_numbers(where, mask)
    n, steps, _ = values_ntd.shape
    if mask_nt.shape != (n, steps):
        raise DataError(f"{where}: expected shape {(n, steps)}; got {describe(mask)}")
    lengths_n = mask_nt.astype(bool).sum(axis=1)
    front_nt = np.arange(steps) < lengths_n[:, None]
    fits_n = (mask_nt == front_nt).all(axis=1) | (mask_nt == front_nt[:, ::-1]).all(axis=1)
    if not fits_n.all():
        raise DataError(f"{where}: sample {np.argmin(fits_n)}: expected ones in one piece from the start or to the end")
    for i in range(n):
        if values_ntd[i][mask_nt[i] == 0].any():
            raise DataError(f"{where}: sample {i}: expected only zero features where the mask is 0; got others")
    return values_ntd, lengths_n.astype(np.int64)


FORMAT = Format(
    name="univa",
    title="a folder of UniVA's ..._utt_VA.pkl and ..._text_glove300_VA.pkl",
    detect=_detect,
    read=_read,
    write=lambda data, path: write_univa(data, path),
)

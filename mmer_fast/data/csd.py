"""A folder of computational sequences of the CMU-MultimodalSDK, as CMU-MOSEI is distributed.

    *.csd          HDF5: /<root>/data/<id>/features (T, D), /<root>/data/<id>/intervals (T, 2) in seconds
    splits.json    {"train": [video ids], "valid": [...], "test": [...]}, the standard folds

One file a modality and one of labels, whose file or root name holds "label". Modalities are named text, video or
audio after what their file or root name holds (``WordVectors``, ``glove``; ``Facet``, ``OpenFace``;
``COVAREP``, ``openSMILE``; ...), otherwise after the file. Files of words or phones (no numbers) are left out.

A sample is a *segment*, a row of a video's labels. Two forms are read: as distributed, a video's steps belong
to the segment whose interval holds the middle of theirs; and as the SDK's ``align`` writes it, where id
``<video>[<k>]`` names the same segment in every file and all of its rows are its steps. Segments without a
step in any modality are left out; one without steps in some modality lacks that modality. Not supported:
collapse functions (align with the SDK first), features of more than two axes.

Label columns are those of CMU-MOSEI (see `labels.from_columns`): sentiment, happy, sad, anger, surprise,
disgust, fear from 0 to 3, present where above 0; or a sentiment alone. For prediction splits may be missing in
``splits.json``, but not the file of labels: it says where segments begin and end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast._files import write_folder_atomically
from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.csd_file import entries_of, entry_of, holds_numbers, root_name, write_file
from mmer_fast.data.errors import DataError, MissingPart
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.hdf5 import open_hdf5, require_h5py, rows
from mmer_fast.data.labels import as_numbers, from_columns
from mmer_fast.data.needs import SPLITS, Needs
from mmer_fast.data.sequences import pad
from mmer_fast.data.writing import require_emotions, samples, sentiment_of

SPLITS_FILE = "splits.json"
MODALITY_WORDS = {
    "text": ("wordvector", "glove", "bert", "text"),
    "video": ("facet", "openface", "visual", "vision", "video"),
    "audio": ("covarep", "opensmile", "acoustic", "audio"),
}
_ALIGNED_ID = re.compile(r".*\[\d+\]", re.DOTALL)
_WRITTEN_SEGMENTS, _SECONDS = 3, 10.0  # segments a written video, and the length of one


@dataclass(frozen=True)
class _Segment:
    id: str  # of the labels' entry
    row: int  # in that entry
    start: float
    end: float

    @property
    def video(self) -> str:
        return self.id.rpartition("[")[0] if _ALIGNED_ID.fullmatch(self.id) else self.id

    @property
    def name(self) -> str:
        """Unique: ``<video>[<k>]``, as the SDK names aligned segments."""
        return self.id if _ALIGNED_ID.fullmatch(self.id) else f"{self.id}[{self.row}]"


def _read(source: Source) -> MultiModalData:
    folder = source.path if source.path.is_dir() else source.path.parent
    notes: list[str] = []
    label_file, modality_files = _roles(folder, notes)
    segments, values = _labels(label_file)
    labels, label_names = from_columns(f"{label_file}", values, notes)
    chosen = _chosen(folder, segments, source.needs, notes)
    steps = {name: _steps(file, segments) for name, file in modality_files.items()}
    splits = {}
    for split in chosen:
        kept = [i for i in chosen[split] if any(len(steps[name][i]) for name in steps)]
        if len(kept) < len(chosen[split]):
            notes.append(f"{split}: {len(chosen[split]) - len(kept)} segments without a step in any modality left out")
        if not kept:
            raise DataError(f"{folder / SPLITS_FILE}: {split}: expected a segment with steps; got none")
        chosen[split] = kept
        extras = {"id": np.array([segments[i].name for i in kept])}
        splits[split] = Split({}, {}, labels[kept], extras)
    for name, file in modality_files.items():
        for split in chosen:
            wanted = [(segments[i], steps[name][i]) for i in chosen[split]]
            splits[split].features[name], splits[split].lengths[name] = _features(name, file, wanted, notes)
    first = next(iter(splits.values()))
    sizes = {name: first.features[name].shape[2] for name in modality_files}
    return MultiModalData(splits, label_names, sizes, str(folder), list(dict.fromkeys(notes)))


def _roles(folder: Path, notes: list[str]) -> tuple[Path, dict[str, Path]]:
    """The file of labels, and modality -> file."""
    labels, features, names = [], {}, {}
    for file in sorted(folder.glob("*.csd")):
        with open_hdf5(file) as h5:
            root = root_name(h5, file)
            called = f"{file.stem} {root}".lower()
            if "label" in called:
                labels.append(file)
            elif not holds_numbers(h5, file):
                notes.append(f"{file.name}: holds no numbers, left out")
            else:
                features[file] = re.sub(r"\W+", "_", file.stem).lower()
                names[file] = next((m for m, words in MODALITY_WORDS.items() if any(w in called for w in words)), "")
    if len(labels) != 1:
        got = ", ".join(file.name for file in labels) or "none"
        error = DataError if labels else MissingPart
        raise error(f'{folder}: expected one .csd of labels (its file or root name holds "label"); got {got}')
    if not features:
        raise DataError(f"{folder}: expected a .csd of features beside {labels[0].name}; got none")
    result = {}
    for file, own_name in features.items():
        name = names[file]
        single = bool(name) and list(names.values()).count(name) == 1
        result[name if single else own_name] = file
    if len(result) != len(features):
        raise DataError(f"{folder}: expected files of different names; got {', '.join(f.name for f in features)}")
    order = [name for name in MODALITY_WORDS if name in result]
    return labels[0], {name: result[name] for name in [*order, *(n for n in result if n not in order)]}


def _labels(file: Path) -> tuple[list[_Segment], np.ndarray]:
    """All segments, and their (S, K) labels."""
    segments: list[_Segment] = []
    values = []
    with open_hdf5(file) as h5:
        data = entries_of(h5, file)
        for entry in data:
            intervals, features = entry_of(data, entry, file, "fiu")
            times = intervals[()].astype(np.float64)
            segments += [_Segment(entry, i, start, end) for i, (start, end) in enumerate(times.tolist())]
            values.append(as_numbers(f"{file}: {entry!r}", features[()], len(times)))
            if values[-1].shape[1] != values[0].shape[1]:
                got, expected = values[-1].shape[1], values[0].shape[1]
                raise DataError(f"{file}: {entry!r}: expected {expected} label columns; got {got}")
    return segments, np.concatenate(values)


def _chosen(folder: Path, segments: list[_Segment], needs: Needs, notes: list[str]) -> dict[str, list[int]]:
    """Indices of each split's segments, in the order of ``splits.json``."""
    path = folder / SPLITS_FILE
    how = '{"train": [video ids], "valid": [...], "test": [...]}'
    if not path.is_file():
        raise DataError(
            f"{folder}: the .csd files do not say which video belongs to which split; write {SPLITS_FILE} beside them: "
            f"{how}, e.g. from the standard folds of the SDK"
        )
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON: {how} ({error})") from None
    if not isinstance(folds, dict) or not set(folds) <= set(SPLITS):
        raise DataError(f"{path}: expected {how}")
    wanted = needs.wanted(folds)
    if not set(wanted) <= set(folds):
        raise MissingPart(f"{path}: expected {how}")
    of_video: dict[str, list[int]] = {}
    for i, segment in sorted(enumerate(segments), key=lambda pair: (pair[1].start, pair[0])):
        of_video.setdefault(segment.video, []).append(i)
    chosen: dict[str, list[int]] = {}
    seen: dict[str, str] = {}
    for split in wanted:
        videos = folds[split]
        if not isinstance(videos, list) or not all(isinstance(video, str) for video in videos):
            raise DataError(f"{path}: {split}: expected a list of video ids")
        for video in videos:
            if seen.setdefault(video, split) != split:
                raise DataError(f"{path}: video {video!r}: expected in one split; got {seen[video]} and {split}")
        absent = [video for video in videos if video not in of_video]
        if absent:
            notes.append(f"{split}: {len(absent)} of {len(videos)} videos have no labels, left out")
        chosen[split] = [i for video in dict.fromkeys(videos) for i in of_video.get(video, [])]
    unused = [video for video in of_video if video not in seen]
    if unused:
        notes.append(f"{len(unused)} of {len(of_video)} videos are in no split, left out")
    return chosen


def _steps(file: Path, segments: list[_Segment]) -> list[np.ndarray]:
    """For each segment the rows of the modality's entry that belong to it."""
    steps, middles = [], {}
    with open_hdf5(file) as h5:
        data = entries_of(h5, file)
        present = set(data)
        for segment in segments:
            name = _name_in(present, segment)
            if name is None:
                steps.append(np.empty(0, np.int64))
                continue
            if name not in middles:
                middles = {name: entry_of(data, name, file)[0][()].astype(np.float64).mean(axis=1)}
            times = middles[name]
            whole = _ALIGNED_ID.fullmatch(name) is not None
            inside = np.ones(len(times), bool) if whole else (times >= segment.start) & (times < segment.end)
            steps.append(np.flatnonzero(inside))
    return steps


def _name_in(present: set[str], segment: _Segment) -> str | None:
    """Under which id a modality's file holds a segment: its own, a numbered one, or its video's."""
    names = (segment.id, segment.name, segment.video)
    return next((name for name in names if name in present), None)


def _features(
    name: str, file: Path, wanted: list[tuple[_Segment, np.ndarray]], notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(N, T, D) features and (N,) lengths of a split's segments."""
    with open_hdf5(file) as h5:
        data = entries_of(h5, file)
        present = set(data)
        size = entry_of(data, next(iter(data)), file)[1].shape[1]

        def sequences() -> Any:
            held: tuple[str, np.ndarray] = ("", np.empty((0, size), np.float32))
            for segment, steps in wanted:
                entry = _name_in(present, segment)
                if entry is not None and len(steps) and entry != held[0]:
                    held = (entry, rows(entry_of(data, entry, file)[1]))
                    if held[1].shape[1] != size:
                        raise DataError(f"{file}: {entry!r}: expected {size} features; got {held[1].shape[1]}")
                yield held[1][steps]

        return pad(name, [(len(steps), size) for _, steps in wanted], sequences(), notes, derive=False)


def write_csd(data: MultiModalData, path: str | Path) -> None:
    """Write a new folder of ``.csd`` files and ``splits.json``, whole or not at all, with several segments a video
    and the time of each step. Extras are left out.

    Raises:
        DataError: other labels than the six emotions, the folder exists, or h5py is missing.
    """
    require_emotions("a folder of .csd files", data)
    require_h5py(Path(path))
    videos = {
        name: [f"{name}_{i:05d}" for i in range(-(-len(split) // _WRITTEN_SEGMENTS))]
        for name, split in data.splits.items()
    }

    def write(folder: Path) -> None:
        (folder / SPLITS_FILE).write_text(json.dumps(videos, indent=1), encoding="utf-8")
        for modality in data.modalities:
            write_file(folder / f"{modality}.csd", modality, _entries(data, videos, modality))
        write_file(folder / "labels.csd", "All Labels", _entries(data, videos, None))

    write_folder_atomically(Path(path), write)


def _entries(
    data: MultiModalData, videos: dict[str, list[str]], modality: str | None
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(video, features, intervals) of a modality, or of the labels."""
    for name, split in data.splits.items():
        if modality is None:
            columns = np.concatenate([sentiment_of(split.labels)[:, None], split.labels], axis=1)
            sequences = [row[None] for row in columns.astype(np.float32)]
        else:
            sequences = samples(split, modality)
        for v, video in enumerate(videos[name]):
            parts = sequences[v * _WRITTEN_SEGMENTS : (v + 1) * _WRITTEN_SEGMENTS]
            edges = [
                (k + np.linspace(0, 1, len(part) + 1)) * _SECONDS if len(part) else np.empty(0)
                for k, part in enumerate(parts)
            ]
            intervals = [np.stack([edge[:-1], edge[1:]], axis=1) for edge in edges if len(edge)]
            if intervals:
                yield video, np.concatenate(parts), np.concatenate(intervals)


FORMAT = Format(
    name="csd",
    title="a folder of .csd files of the CMU-MultimodalSDK",
    detect=lambda source: source.suffix == ".csd" or any(name.endswith(".csd") for name in source.files),
    read=_read,
    write=lambda data, path: write_csd(data, path),
)

"""What the writers of others' formats share."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast._files import write_atomically
from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.errors import DataError
from mmer_fast.data.labels import EMOTIONS


def write_pickle(path: Path, value: Any, protocol: int = 4) -> None:
    """Write a pickle, whole or not at all."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            pickle.dump(value, file, protocol=protocol)

    write_atomically(path, write)


def require_labels(title: str, data: MultiModalData) -> None:
    """DataError unless every split has labels."""
    unlabelled = [name for name, split in data.splits.items() if not split.labelled]
    if unlabelled:
        raise DataError(f"{title} is written with labels; {', '.join(unlabelled)} has none (.npz and .safetensors do)")


def require_modalities(title: str, data: MultiModalData, names: Sequence[str]) -> None:
    """DataError unless the modalities are ``names``, in any order, and every split has labels."""
    require_labels(title, data)
    if set(data.modalities) != set(names):
        raise DataError(f"{title} holds the modalities {', '.join(names)}; got {', '.join(data.modalities)}")


def require_emotions(title: str, data: MultiModalData) -> None:
    """DataError unless the labels are the six emotions of CMU-MOSEI, known in every split."""
    require_labels(title, data)
    if data.label_names != EMOTIONS:
        raise DataError(f"{title} is written from the labels {', '.join(EMOTIONS)}; got {', '.join(data.label_names)}")


def sentiment_of(labels_nk: np.ndarray) -> np.ndarray:
    """(N,) float32 in [-3, 3] from the six emotions: 1.5 for happy, -0.75 for each of the sad ones, 0 for surprise."""
    weights_k = np.array([1.5, -0.75, -0.75, 0, -0.75, -0.75], dtype=np.float32)
    return labels_nk.astype(np.float32) @ weights_k


def samples(split: Split, modality: str) -> list[np.ndarray]:
    """The split's sequences without their padding, (L, D) each."""
    lengths = split.lengths[modality]
    return [split.features[modality][i, : lengths[i]] for i in range(len(split))]

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmer_fast.data import MultiModalData, Split
from mmer_fast.data.labels import EMOTIONS


def _split(rng: np.random.Generator, n: int) -> Split:
    features, lengths = {}, {}
    for name, steps, size in (("text", 6, 5), ("video", 4, 3)):
        lengths[name] = rng.integers(0, steps + 1, size=n)
        lengths[name][0] = 0
        x = rng.standard_normal((n, steps, size)).astype(np.float32)
        x[np.arange(steps) >= lengths[name][:, None]] = 0
        features[name] = x
    return Split(features, lengths, rng.integers(0, 2, size=(n, 3), dtype=np.uint8))


@pytest.fixture
def make_small() -> Callable[[], MultiModalData]:
    """A maker of small valid data sets, two modalities of different T, some samples lacking one."""

    def make() -> MultiModalData:
        rng = np.random.default_rng(0)
        splits = {name: _split(rng, n) for name, n in (("train", 7), ("valid", 3), ("test", 4))}
        return MultiModalData(splits, ["a", "b", "c"], {"text": 5, "video": 3}, "made for a test").check()

    return make


@pytest.fixture(scope="session")
def emotional() -> MultiModalData:
    """A tiny data set that every format can hold: text, video, audio and the six emotions."""
    rng = np.random.default_rng(1)
    splits = {}
    for split, n in (("train", 7), ("valid", 4), ("test", 5)):
        features, lengths = {}, {}
        for name, size in (("text", 5), ("video", 3), ("audio", 4)):
            lengths[name] = rng.integers(1, 7, size=n)
            lengths[name][0] = 6  # in every split a sequence of full length
            if name == "text":
                lengths[name][1] = 0
            x = rng.standard_normal((n, 6, size)).astype(np.float32)
            x[np.arange(6) >= lengths[name][:, None]] = 0
            features[name] = x
        splits[split] = Split(features, lengths, rng.integers(0, 2, size=(n, 6), dtype=np.uint8))
        splits[split].labels[2] = 0
    return MultiModalData(splits, list(EMOTIONS), {"text": 5, "video": 3, "audio": 4}, "made for a test").check()


@pytest.fixture
def pom_dir() -> Path:
    """The folder of the POM files, which are not part of the repository."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data" / "pom"
    folder = Path(os.environ.get("MMER_FAST_POM_DIR", default))
    if not (folder / "pom.npz").is_file():
        pytest.skip(f"no POM files in {folder}; set MMER_FAST_POM_DIR to their folder")
    return folder

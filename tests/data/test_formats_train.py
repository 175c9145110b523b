"""Every format trains: as it was published, and converted to .npz, to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmer_fast import cli
from mmer_fast.data import FORMATS, MultiModalData, make_synthetic
from mmer_fast.data.labels import EMOTIONS
from mmer_fast.training import train

SIZES = {"dim": 8, "ffn_dim": 8, "heads": 2, "unimodal_blocks": 1, "multimodal_blocks": 1}


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    """Text, video, audio and the six emotions, for which every format has a place."""
    made = make_synthetic(2, n_train=12, n_valid=5, n_test=6, max_length=8)
    assert made.label_names == list(EMOTIONS)
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_trains_as_it_is_and_converted(name: str, data: MultiModalData, tmp_path: Path) -> None:
    source = tmp_path / f"published{FORMATS[name].suffix}"
    FORMATS[name].write(data, source)
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", str(source), str(tmp_path / "converted.npz")])
    assert end.value.code == 0
    settings = {"epochs": 1, "batch_size": 6, "device": "cpu", "show": False, **SIZES}
    runs = [
        train(path, tmp_path / run, **settings)
        for path, run in ((source, "as published"), (tmp_path / "converted.npz", "converted"))
    ]
    assert runs[0].metrics == runs[1].metrics
    assert (tmp_path / "converted" / "report.html").exists()
    weights = [run.model.state_dict() for run in runs]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

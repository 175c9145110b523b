"""The ragged batch; trainings that draw nothing."""

from __future__ import annotations

import pytest
from small_baselines import ragged_batch

from mmer_fast import report
from mmer_fast.data import Batch


@pytest.fixture
def batch() -> Batch:
    return ragged_batch()


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report at the end of a training takes longer than it."""
    monkeypatch.setattr(report, "plot_curves", lambda history, path, **_: path.touch())
    monkeypatch.setattr(report, "write_report", lambda runs, path, **_: path.touch())

"""Every training that the suites ask for, two epochs on the embedded data set. Slow: `make test-slow`.

What a row does differently is asserted of one step, in test_what_rows_change.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmer_fast.ablation import SUITES, Suite, run_suite
from mmer_fast.ablation.plan import Plan, make_plan
from mmer_fast.data import make_synthetic
from mmer_fast.training.run import METRICS_FILE
from mmer_fast.training.settings import Settings


def _plan(suite: Suite) -> Plan:
    data = make_synthetic(0, n_train=2, n_valid=1, n_test=2, max_length=8)
    return make_plan(suite, data, Path("absent"), seeds=[0], settings=Settings())


def _trainings() -> list[tuple[str, str]]:
    """A suite and the slug of a row for each different training."""
    trainings: dict[Path, tuple[str, str]] = {}
    for suite in SUITES.values():
        for run in _plan(suite).chosen([]):
            trainings.setdefault(run.directory, (suite.name, run.row.slug))
    return list(trainings.values())


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "slug"), _trainings())
def test_the_row_trains(suite: str, slug: str, tmp_path: Path) -> None:
    results = run_suite(suite, tmp_path, only=[slug], seeds=1, epochs=2, jobs=1, device="cpu", show=False)
    (row,) = [row for row in results.rows if row.planned.row.slug == slug]
    assert row.errors == {}
    metrics = json.loads((row.planned.runs[0].directory / METRICS_FILE).read_text())
    # A constant answer has .226, as often as a label is there on average; drawn ones .230 with a deviation of .004.
    constant = float(make_synthetic(0).splits["train"].labels.mean())
    assert metrics["train"]["mean_average_precision"] > constant + 0.05

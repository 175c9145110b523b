"""The numbers of a study as JSON: what was trained on what, with which versions, and every value of every run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.systems.measures import Finished
from benchmarks.systems.studies import Study
from mmer_fast.ablation.results import CLASS_COLUMNS, COLUMNS, RowResult, RunResult, SuiteResults
from mmer_fast.bench import machine
from mmer_fast.data import MultiModalData
from mmer_fast.metrics import multilabel_metrics, single_label_metrics
from mmer_fast.training.api import Run
from mmer_fast.training.checkpoint import write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "scikit-learn", "torchmetrics")


def write(study: Study, results: SuiteResults, data: MultiModalData) -> Path:
    """Measure the runs of a study, which are all finished, and write its file."""
    path = RESULTS / f"{study.name}.json"
    RESULTS.mkdir(exist_ok=True)
    write_json(path, to_json(study, results, data))
    return path


def read(name: str) -> dict[str, Any]:
    """The file of a study."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def to_json(study: Study, results: SuiteResults, data: MultiModalData) -> dict[str, Any]:
    plan = results.plan
    return {
        "study": study.name,
        "title": study.suite.title,
        "preset": plan.settings.preset,
        "settings": dict(plan.settings.values),
        "data": dict(plan.data),
        "seeds": list(plan.seeds),
        **machine.provenance(PACKAGES),
        "constant": constant_answers(data),
        "rows": [_row(study, row, data) for row in results.rows],
    }


def _row(study: Study, result: RowResult, data: MultiModalData) -> dict[str, Any]:
    row = result.planned.row
    return {
        "name": row.name,
        "slug": row.slug,
        "system": row.system,
        "model": dict(row.model),
        "train": dict(row.train),
        "without": row.without,
        "runs": [
            {"seed": seed, "best_epoch": run.metrics["best_epoch"], "values": _rounded(_values(study, run, data))}
            for seed, run in result.results.items()
        ],
    }


def _values(study: Study, run: RunResult, data: MultiModalData) -> dict[str, float]:
    values = _of_metrics(run.metrics["test"])
    if study.measure is not None:
        names = [name for name in data.modalities if name != run.run.row.without]
        values |= study.measure(Finished(Run(run.run.directory, "cpu").model, data.select(names)))
    return values


def _of_metrics(test: Mapping[str, Any]) -> dict[str, float]:
    """Test metrics by name, those of the parts of the split as ``part/<code>/<metric>``."""
    names = [name for name in (*COLUMNS, *CLASS_COLUMNS) if name in test]
    values = {name: test[name] for name in names}
    for code, part in test.get("shift", {}).items():
        values |= {f"part/{code}/{name}": part[name] for name in names if name in part}
    return values


def constant_answers(data: MultiModalData) -> dict[str, dict[str, float]]:
    """Test metrics of those who always say the 1, or the 2, most frequent labels of the training data."""
    frequency_k = torch.from_numpy(data.splits["train"].labels).double().mean(dim=0)
    test = data.splits["test"]
    labels_nk = torch.from_numpy(test.labels)
    answers = {}
    for count in (1, 2):
        p_k = torch.zeros_like(frequency_k).index_fill(0, frequency_k.topk(count).indices, 1.0)
        metrics = _constant(p_k, labels_nk)
        for code in sorted(set(test.extras.get("shift", ()))):
            part = _constant(p_k, labels_nk[torch.from_numpy(test.extras["shift"] == code)])
            metrics["shift"] = {**metrics.get("shift", {}), str(code): part}
        answers[str(count)] = _rounded(_of_metrics(metrics))
    return answers


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items()}


def _constant(p_k: torch.Tensor, labels_nk: torch.Tensor) -> dict[str, Any]:
    p_nk = p_k.expand(len(labels_nk), -1)
    metrics = multilabel_metrics(p_nk, labels_nk)
    if (labels_nk.sum(dim=1) == 1).all():
        metrics |= single_label_metrics(p_nk, labels_nk)
    return metrics

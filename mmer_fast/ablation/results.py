"""Numbers of an ablation: values of every run, their mean and spread over seeds, and the difference to the first row.

The spread is the sample standard deviation (n - 1). Rows share their seeds, and with a seed the initialisation and the
order of the data: a difference is taken between runs of the same seed, and its spread is that of the pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmer_fast.ablation.plan import Plan, PlannedRow, PlannedRun
from mmer_fast.data.synthetic import SHIFT_NONE
from mmer_fast.report.published import METRICS as PUBLISHED_METRICS
from mmer_fast.report.published import WARNING
from mmer_fast.training.checkpoint import CheckpointError, read_json
from mmer_fast.training.run import METRICS_FILE

COLUMNS = {
    "accuracy": "Acc",
    "micro_precision": "P",
    "micro_recall": "R",
    "micro_f1": "miF1",
    "hamming_loss": "HL",
    "macro_f1": "maF1",
}
"""Metrics of a table, in the order of its columns; precision and recall are over all decisions, as miF1 is."""
CLASS_COLUMNS = {"weighted_f1": "wF1", "overall_accuracy": "WA", "unweighted_accuracy": "UA"}
"""Metrics of data with one class a sample, in further columns."""
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (None of a single value) of `n` values."""

    mean: float
    std: float | None
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Statistic | None:
        """That of values; None where there are none."""
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return Statistic(statistics.fmean(values), std, len(values))

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std, "n": self.n}


@dataclass(frozen=True)
class RunResult:
    """A finished run: `metrics` is its `metrics.json`, `values` every number in it that is worth a mean, by name."""

    run: PlannedRun
    metrics: Mapping[str, Any]
    values: Mapping[str, float]

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        history: Sequence[Mapping[str, Any]] = self.metrics["history"]
        return history


@dataclass(frozen=True)
class RowResult:
    """A row with those of its runs that are finished, by seed, and the errors of those that failed."""

    planned: PlannedRow
    results: Mapping[int, RunResult]
    errors: Mapping[int, str]

    def statistic(self, name: str) -> Statistic | None:
        """Of a value over the seeds that have it."""
        return Statistic.of([result.values[name] for result in self.results.values() if name in result.values])

    def difference(self, base: RowResult, name: str) -> Statistic | None:
        """Of a value's differences to those of another row, seed by seed."""
        pairs = [(self.results[seed].values, base.results[seed].values) for seed in self.results.keys() & base.results]
        return Statistic.of([mine[name] - theirs[name] for mine, theirs in pairs if name in mine and name in theirs])


@dataclass(frozen=True)
class SuiteResults:
    """What is known of a suite, finished or not; the first of `rows` is the base of all differences."""

    plan: Plan
    rows: tuple[RowResult, ...]

    @property
    def base(self) -> RowResult:
        return self.rows[0]

    @property
    def finished(self) -> int:
        """Runs that are there, those that rows share counted once."""
        return len({result.run.directory for row in self.rows for result in row.results.values()})

    def names(self, prefix: str) -> list[str]:
        """Names of values with this prefix, in the order in which they came up."""
        every = [name for row in self.rows for result in row.results.values() for name in result.values]
        return [name for name in dict.fromkeys(every) if name.startswith(prefix)]

    @property
    def published(self) -> list[RowResult]:
        """The rows that the paper prints numbers of."""
        return [row for row in self.rows if row.planned.row.published is not None]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON data."""
        plan = self.plan
        return {
            "suite": plan.suite.name,
            "title": plan.suite.title,
            "preset": plan.settings.preset,
            "settings": plan.settings.values,
            "data": dict(plan.data),
            "seeds": list(plan.seeds),
            "runs": {"finished": self.finished, "planned": len(plan.chosen([]))},
            "published": WARNING,
            "rows": [self._row_json(row) for row in self.rows],
        }

    def _row_json(self, result: RowResult) -> dict[str, Any]:
        row, plan = result.planned.row, self.plan
        names = list(dict.fromkeys(name for run in result.results.values() for name in run.values))
        return {
            "name": row.name,
            "slug": row.slug,
            "model": dict(row.model),
            "train": dict(row.train),
            "without": row.without,
            "note": row.note,
            "skipped": result.planned.skipped,
            "statistics": {name: _json(result.statistic(name)) for name in names},
            "difference": {name: _json(result.difference(self.base, name)) for name in names},
            "published": None if row.published is None else dict(zip(PUBLISHED_METRICS, row.published, strict=True)),
            "errors": {str(seed): error for seed, error in result.errors.items()},
            "runs": [
                {
                    "seed": seed,
                    "directory": run.run.directory.relative_to(plan.out).as_posix(),
                    "values": dict(run.values),
                    **run.metrics,
                }
                for seed, run in result.results.items()
            ],
        }


def _json(statistic: Statistic | None) -> dict[str, Any] | None:
    return None if statistic is None else statistic.to_json()


def collect(plan: Plan, failed: Mapping[Path, str] | None = None) -> SuiteResults:
    """Read what is finished of a plan.

    Args:
        plan: whose runs are read.
        failed: directory → error of the runs that failed.

    Raises:
        CheckpointError: `metrics.json` of a run is damaged, or of an earlier version of this package.
    """
    rows = []
    for planned in plan.rows:
        finished = [run for run in planned.runs if run.state == "finished"]
        errors = {run.seed: (failed or {})[run.directory] for run in planned.runs if run.directory in (failed or {})}
        rows.append(RowResult(planned, {run.seed: read_result(run) for run in finished}, errors))
    return SuiteResults(plan, tuple(rows))


def read_result(run: PlannedRun) -> RunResult:
    """A finished run.

    Raises:
        CheckpointError: as `collect`.
    """
    path = run.directory / METRICS_FILE
    metrics = read_json(path)
    try:
        return RunResult(run, metrics, values_of(metrics))
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} lacks {error}: remove {run.directory} to train it again") from None


def values_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a run by name.

    - ``<split>/<metric>``: those of `COLUMNS`, and of `CLASS_COLUMNS` if any, on train, valid and test.
    - ``part/<code>``: micro-F1 on a part of the test split, where the data tells parts apart.
    - ``gap/valid``, ``gap/test``: how much lower micro-F1 is there than on the training split; on test without the
      parts that are unlike the training data.
    - ``recall/<modality>``, ``chance/<modality>``: share of the planted units that the masks find, and by chance.
    """
    values = {f"{split}/{metric}": metrics[split][metric] for split in SPLITS for metric in COLUMNS}
    values |= {
        f"{split}/{metric}": metrics[split][metric]
        for split in SPLITS
        for metric in CLASS_COLUMNS
        if metric in metrics[split]
    }
    parts = metrics["test"].get("shift", {})
    values |= {f"part/{code}": part["micro_f1"] for code, part in parts.items()}
    alike = {"valid": metrics["valid"], "test": parts.get(str(SHIFT_NONE), metrics["test"])}
    values |= {f"gap/{split}": metrics["train"]["micro_f1"] - other["micro_f1"] for split, other in alike.items()}
    for modality, recall in metrics["mask_recall"].items():
        values |= {f"recall/{modality}": recall["recall"], f"chance/{modality}": recall["chance"]}
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}

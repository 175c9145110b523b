"""Running an ablation from Python:

    if __name__ == "__main__":  # the runs are trained in processes that import the main module
        results = mmer_fast.ablation.run_suite("table2", "runs/ablation", only=["no-atm", "no-app"], seeds=3)
        results.rows[0].statistic("test/micro_f1").mean

What is finished in the directory is taken as it is, what was begun goes on. The command line does the same through this
module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmer_fast._console import plain_console
from mmer_fast.ablation.display import AblationDisplay
from mmer_fast.ablation.document import write_results
from mmer_fast.ablation.plan import Plan, check_slugs, find_suite, make_plan
from mmer_fast.ablation.results import SuiteResults, collect
from mmer_fast.ablation.runner import resources, train_all
from mmer_fast.ablation.suites import Suite
from mmer_fast.training.api import DataSource, as_device, open_data
from mmer_fast.training.run import RunError, make_directory
from mmer_fast.training.settings import Settings, read_settings

SEEDS = 3


def run_suite(
    suite: str | Suite,
    out: str | Path,
    *,
    data: DataSource = "synthetic",
    only: Sequence[str] = (),
    seeds: int | Sequence[int] = SEEDS,
    preset: str | None = None,
    config: str | Path | None = None,
    jobs: int | None = None,
    device: str | torch.device = "auto",
    train: bool = True,
    show: bool = True,
    **settings: Any,
) -> SuiteResults:
    """Train the rows of a suite that are not there yet, and write its tables and plots.

    Writes `out`/<suite>.json, .md, .html and .png about the whole suite as far as it is finished, also when it is
    interrupted. Runs are in `out`/runs/<row>-seed<N>, each as `mmer-fast train` would leave it without its report. Rows
    of the same settings share their runs, whatever their suites.

    Args:
        suite: one of `mmer_fast.ablation.suites.SUITE_NAMES`, such as "table2" or "univa", or one of your own.
        out: directory, created if needed; of the same preset, settings and data if it holds runs.
        data: a data set, a path that `mmer_fast.data.load` reads, or "synthetic".
        only: slugs of the rows to train; none stands for all.
        seeds: how many, from 0; or which.
        preset: "paper", "authors" or "compact"; None: that of `config`, else "compact".
        config: a YAML or JSON file with settings, as `mmer_fast.training.settings` reads it.
        jobs: runs at the same time; None: one a CPU core, or one a CUDA device.
        device: to train on; "auto" is cuda if there is one, "cuda" every CUDA device.
        train: False only writes the files about what is finished.
        show: progress on standard output.
        settings: fields of the configurations of the suite's system for every row: `epochs=20, dim=256`.

    Returns:
        The results that were written; `RowResult.errors` of a row says which of its runs failed.

    Raises:
        RunError: an unknown suite, row, preset or setting; the first row, or one of `only`, cannot be trained with them
            (others are left out, and the tables say why); `out` cannot be written or holds a run with other settings or
            of other data.
        CheckpointError: a file of a run in `out` is damaged.
        DataError: the data cannot be read or used.
    """
    chosen = find_suite(suite) if isinstance(suite, str) else suite
    check_slugs(chosen, only)
    asked = (Settings() if config is None else read_settings(Path(config))).updated(preset, settings)
    loaded = open_data(data)
    plan = make_plan(chosen, loaded, Path(out), seeds=_seeds(seeds), settings=asked, only=only)
    make_directory(plan.out)
    console = plain_console(quiet=not show)
    failed: dict[Path, str] = {}
    try:
        if train:
            failed = _train(plan, only, data, jobs, as_device(device), console)
    finally:
        results = collect(plan, failed)
        paths = write_results(results)
    console.print(
        f"{results.finished} of {len(plan.chosen([]))} runs finished; written to {paths[0].parent}: "
        f"{', '.join(path.name for path in paths)}",
        soft_wrap=True,
    )
    return results


def _train(
    plan: Plan, only: Sequence[str], data: DataSource, jobs: int | None, device: torch.device, console: Console
) -> dict[Path, str]:
    runs = plan.chosen(only)
    missing = [run for run in runs if run.state != "finished"]
    if not missing:
        return {}
    shared = resources(device, jobs, len(missing))
    with AblationDisplay(console, len(missing)) as display:
        for row in plan.rows:
            if row.skipped:
                display.say(f"{row.row.name}: left out, {row.skipped}")
        display.say(
            f"{plan.suite.title}: {len(missing)} runs to train, {len(runs) - len(missing)} finished before; "
            f"{shared.jobs} at a time on {', '.join(shared.devices)}"
        )
        return train_all(missing, data, shared, display)


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) != len(chosen):
        raise RunError(f"seeds must be at least 1, or different numbers, got {seeds}")
    return chosen

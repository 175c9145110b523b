"""The commands of `mmer-fast` that train many rows: ablate, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmer_fast.ablation.api import SEEDS, run_suite
from mmer_fast.ablation.comparison import comparison
from mmer_fast.ablation.suites import SUITE_NAMES, Suite
from mmer_fast.systems.registry import NAMES
from mmer_fast.training.commands import app
from mmer_fast.training.options import (
    ConfigOption,
    DataOption,
    DeviceOption,
    PresetOption,
    SetOption,
    asked_settings,
    choose_device,
)
from mmer_fast.training.settings import Settings

OutOption = Annotated[Path, typer.Option(help="Directory for runs, tables and plots; created if needed.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Runs of each row, with the seeds 0, 1, ...")]
EpochsOption = Annotated[int | None, typer.Option(help="Passes over the training data.")]
JobsOption = Annotated[
    int | None, typer.Option(min=1, help="Runs at the same time. Default: one a CPU core, or one a CUDA device.")
]
TrainOption = Annotated[
    bool, typer.Option("--train/--no-train", help="Train what is missing, or only write about what is there.")
]


@app.command()
def ablate(
    suite: Annotated[str, typer.Option(help=f"Which rows: {', '.join(SUITE_NAMES)}.")],
    out: OutOption,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ROW", help="Train only this row, e.g. no-atm; repeatable.")
    ] = None,
    seeds: SeedsOption = SEEDS,
    data: DataOption = "synthetic",
    preset: PresetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    epochs: EpochsOption = None,
    jobs: JobsOption = None,
    device: DeviceOption = "auto",
    train: TrainOption = True,
) -> None:
    """Train every row of a table or figure of a system's paper over several seeds; the same command goes on later."""
    asked = asked_settings(None, preset, config, settings, {"epochs": epochs})
    _run(suite, out, asked, device, data=data, only=only or (), seeds=seeds, jobs=jobs, train=train)


@app.command()
def compare(
    models: Annotated[str, typer.Option(help=f"Systems, separated by commas: {', '.join(NAMES)}.")],
    out: OutOption,
    seeds: SeedsOption = SEEDS,
    data: DataOption = "synthetic",
    preset: PresetOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A setting that all of them have; repeatable."),
    ] = None,
    epochs: EpochsOption = None,
    jobs: JobsOption = None,
    device: DeviceOption = "auto",
    train: TrainOption = True,
) -> None:
    """Train several systems on the same data over several seeds: one table, one page. The first is the base."""
    suite = comparison([name.strip() for name in models.split(",")])
    asked = asked_settings(None, preset, None, settings, {"epochs": epochs})
    _run(suite, out, asked, device, data=data, seeds=seeds, jobs=jobs, train=train)


def _run(suite: str | Suite, out: Path, asked: Settings, device: str, **options: Any) -> None:
    try:
        results = run_suite(suite, out, preset=asked.preset, device=choose_device(device), **options, **asked.values)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on where this one stopped", err=True)
        raise typer.Exit(130) from None
    errors = [
        f"{row.planned.row.name}, seed {seed}: {error}" for row in results.rows for seed, error in row.errors.items()
    ]
    for error in errors:
        typer.echo(f"mmer-fast: error: {error}", err=True)
    if errors:
        raise typer.Exit(1)

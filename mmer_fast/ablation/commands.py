"""The command of `mmer-fast` that runs the ablations: ablate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmer_fast.ablation.api import SEEDS, run_suite
from mmer_fast.ablation.suites import SUITES
from mmer_fast.training.commands import (
    ConfigOption,
    DataOption,
    DeviceOption,
    PresetOption,
    SetOption,
    app,
    asked_settings,
    choose_device,
)


@app.command()
def ablate(
    suite: Annotated[str, typer.Option(help=f"Which rows: {', '.join(SUITES)}.")],
    out: Annotated[Path, typer.Option(help="Directory for runs, tables and plots; made if need be.")],
    only: Annotated[
        list[str] | None, typer.Option(metavar="ROW", help="Train only this row, e.g. no-atm; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each row, with the seeds 0, 1, ...")] = SEEDS,
    data: DataOption = "synthetic",
    preset: PresetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at the same time. Default: one a CPU core, or one a CUDA device.")
    ] = None,
    device: DeviceOption = "auto",
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Train what is missing, or only write about what is there.")
    ] = True,
) -> None:
    """Train every row of a table or figure of the paper over several seeds; the same command goes on with it later."""
    asked = asked_settings(None, preset, config, settings, {"epochs": epochs})
    try:
        results = run_suite(
            suite,
            out,
            data=data,
            only=only or (),
            seeds=seeds,
            preset=asked.preset,
            jobs=jobs,
            device=choose_device(device),
            train=train,
            **asked.values,
        )
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

"""The options that several commands of `mmer-fast` have, and what is made of them: a device, settings, data."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmer_fast.data import MultiModalData, load, loading
from mmer_fast.data.needs import Needs
from mmer_fast.models.network import Network
from mmer_fast.systems.registry import NAMES
from mmer_fast.training.api import as_device
from mmer_fast.training.files import BEST_FILE
from mmer_fast.training.missing import data_for
from mmer_fast.training.run import RunConfig
from mmer_fast.training.settings import Settings, asked_for, parse_assignments


class SplitName(str, Enum):
    """Splits of a data set."""

    train = "train"
    valid = "valid"
    test = "test"


GENERATED = " or ".join(f'"{name}"' for name in loading.GENERATORS)
DataOption = Annotated[str, typer.Option(help=f"A data file or folder (see inspect), or generated: {GENERATED}.")]


def _directory_of_run(path: Path) -> Path:
    """The directory, also where its checkpoint is named."""
    return path.parent if path.name == BEST_FILE and path.is_file() else path


RunOption = Annotated[
    Path,
    typer.Option(
        "--run",
        "--checkpoint",
        help=f"Directory of a finished training, or its {BEST_FILE}.",
        callback=_directory_of_run,
    ),
]
DeviceOption = Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", or "auto": cuda if there is one.')]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Samples computed at a time; the default is that of the training."),
]
SplitOption = Annotated[SplitName, typer.Option(help="Which part of the data.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help=f"{', '.join(NAMES)}. Default: that of --config, else {NAMES[0]}."),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        help="compact: small, for a CPU. authors: as their code does it. Some systems have more; RobMMR: paper, as "
        "published. Default: that of --config or of the run that is resumed, else compact."
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A YAML or JSON file with settings; the command config writes one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any setting by its name, e.g. --set rho=0.5; repeatable."),
]


def choose_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        RunError: as `as_device`.
    """
    return as_device(name, "--device")


def asked_settings(
    model: str | None,
    preset: str | None,
    config: Path | None,
    assignments: list[str] | None,
    options: dict[str, Any],
    stored: RunConfig | None = None,
) -> Settings:
    """Everything that the command line says about the configuration; what is more particular wins."""
    settings = asked_for(config, model, stored.system if stored else None)
    given = {name: value for name, value in options.items() if value is not None}
    return settings.updated(preset, {**parse_assignments(assignments or ()), **given})


def data_with_notes(model: Network, source: str, needs: Needs) -> MultiModalData:
    """The data of a command for a model; says on stderr what is missing.

    Raises:
        DataError, RunError: as `load` and `data_for`; or the data lacks what the model reads beside features.
    """
    data, notes = data_for(model.modalities, load(source, needs=needs))
    model.check_inputs(data, model.config)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    return data

"""The commands train, config, evaluate and predict; those for data files are in `mmer_fast.data.commands`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmer_fast._console import plain_console, print_table
from mmer_fast.data import MultiModalData, load
from mmer_fast.data import commands as data_commands
from mmer_fast.data.needs import EVERYTHING, Needs, for_prediction
from mmer_fast.models.network import Network
from mmer_fast.report.tables import shift_names
from mmer_fast.training.display import conditions_table, metrics_table
from mmer_fast.training.distributed import TIMEOUT, World, joined
from mmer_fast.training.errors import Terminated
from mmer_fast.training.evaluate import evaluate as evaluate_split
from mmer_fast.training.evaluate import predict_probabilities
from mmer_fast.training.missing import needing_labels
from mmer_fast.training.observers import check_tensorboard
from mmer_fast.training.options import (
    GENERATED,
    BatchOption,
    ConfigOption,
    DataOption,
    DeviceOption,
    ModelOption,
    PresetOption,
    RunOption,
    SetOption,
    SplitName,
    SplitOption,
    asked_settings,
    choose_device,
    data_with_notes,
)
from mmer_fast.training.origin import origin_in_words
from mmer_fast.training.predictions import Predictions, check_suffix, identifiers
from mmer_fast.training.run import (
    CONFIG_FILE,
    RunConfig,
    RunError,
    check_same,
    configured_run,
    holds_run,
    load_best,
    make_directory,
)
from mmer_fast.training.settings import configure, to_yaml
from mmer_fast.training.shown import REPORT_FILE, draw, train_shown

app = typer.Typer(
    help="Train and use RobMMR, a robust multi-modal multi-label emotion recogniser, and its sister systems.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Directory for checkpoints, metrics and curves; created if needed.")],
    data: Annotated[
        str | None,
        typer.Option(
            help=f"A data file or folder (see inspect), or {GENERATED}. Default: the first; on --resume the same."
        ),
    ] = None,
    model: ModelOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation, data order and dropout.")] = None,
    modalities: Annotated[str | None, typer.Option(help="Use only these, separated by commas.")] = None,
    device: DeviceOption = "auto",
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints within an epoch; 0: at the end of epochs only."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that prepare batches ahead; the result is the same with any number.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last checkpoint.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log for TensorBoard, into the directory tensorboard of --out.")
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Under torchrun: shard the parameters over the processes (FSDP2).")
    ] = False,
    timeout: Annotated[
        int, typer.Option(min=1, help="Under torchrun: seconds that a process waits for the others.")
    ] = int(TIMEOUT),
) -> None:
    """Train a model; shows progress, then the metrics of the epoch that was best on the validation split.

    Under torchrun the processes train together: a batch is divided among them, and one shows and writes.
    """
    with joined(lambda: choose_device(device), fsdp=fsdp, timeout=timeout) as world:
        if tensorboard:
            check_tensorboard()
        stored = _stored_run(out, resume)
        options = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr, "seed": seed}
        options |= {"checkpoint_every": checkpoint_every, "workers": workers}
        asked = asked_settings(model, preset, config, settings, options, stored)
        configs = configure(asked, (stored.model, stored.train) if stored else None)
        loaded = load(
            data or (stored.data["source"] if stored else "synthetic"), modalities=_modalities(modalities, stored)
        )
        run = configured_run(asked.kind, configs, loaded)
        if stored:
            check_same(stored, run)
        if world.first:
            make_directory(out)
        console = plain_console()
        with _end_explained(out, world):
            results = train_shown(run, loaded, out, world.device, console, tensorboard=tensorboard, world=world)
    if world.first:  # the others do not wait for it: where it takes long they would time out
        with _end_explained(out, world):
            draw(results, loaded, out, world)
        _show(results, loaded, out, console)


@app.command("config")
def show_config(
    model: ModelOption = None, preset: PresetOption = None, config: ConfigOption = None, settings: SetOption = None
) -> None:
    """Print every setting as YAML, to be edited and given to train --config."""
    asked = asked_settings(model, preset, config, settings, {})
    typer.echo(to_yaml(*configure(asked), asked.kind.name), nl=False)


@app.command()
def evaluate(
    run: RunOption,
    data: DataOption,
    split: SplitOption = SplitName.test,
    device: DeviceOption = "auto",
    batch_size: BatchOption = None,
    conditions: Annotated[
        bool, typer.Option("--conditions", help="Measure with every combination of modalities missing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every metric as JSON.")] = False,
) -> None:
    """Measure the best model of a run on a split of a data set."""
    with needing_labels():
        model, header, loaded = _model_and_data(run, data, device, EVERYTHING)
    if loaded.label_names != header["label_names"]:
        raise RunError(f"{data}: expected the labels {header['label_names']}; got {loaded.label_names}")
    options = {"threshold": header["threshold"], "batch_size": batch_size or header["evaluation_batch_size"]}
    if conditions:
        from mmer_fast.systems.mmin.evaluation import evaluate_conditions  # imported only where needed

        if len(model.modalities) < 2:
            raise RunError(f"--conditions: expected at least two modalities, got {', '.join(model.modalities)}")
        absent = [name for name in model.modalities if not any(s.lengths[name].any() for s in loaded.splits.values())]
        if absent:
            raise RunError(f"--conditions: expected all modalities in {data}, got none of {', '.join(absent)}")
        table = evaluate_conditions(model, loaded.splits[split.value], **options)
        if as_json:
            typer.echo(json.dumps(table.columns(), indent=2))
        else:
            title = f"{run}: {split.value}, by what is there"
            print_table(plain_console(), conditions_table(table.columns(), table.titles, title))
        return
    result = evaluate_split(model, loaded.splits[split.value], **options)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        title = "\n".join(filter(None, [str(run), origin_in_words(header)]))
        print_table(plain_console(), metrics_table({split.value: result}, title, shift_names(loaded.source)))


@app.command()
def predict(
    run: RunOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="A .csv, .npz or .jsonl file for the label probabilities.")],
    split: SplitOption = SplitName.test,
    device: DeviceOption = "auto",
    batch_size: BatchOption = None,
) -> None:
    """Write the probability of every label for every sample of a split, the only part that DATA needs to have.

    Labels are not needed.
    """
    check_suffix(out)
    if not os.access(out.absolute().parent, os.W_OK):
        raise RunError(f"--out: cannot write to the directory {out.absolute().parent}")
    model, header, loaded = _model_and_data(run, data, device, for_prediction(split.value))
    part = loaded.splits[split.value]
    size = batch_size or header["evaluation_batch_size"]
    probabilities_nk = predict_probabilities(model, part, size).numpy()
    names, threshold = header["label_names"], header["threshold"]
    Predictions(probabilities_nk, names, threshold, identifiers(part), model.outputs).write(out)
    weights = origin_in_words(header)
    line = f"{len(probabilities_nk)} samples written to {out}" + (f"; weights: {weights}" if weights else "")
    plain_console().print(line, soft_wrap=True)


data_commands.register(app)


@contextmanager
def _end_explained(out: Path, world: World) -> Iterator[None]:
    """Around a training: where it ends before its time, the first process says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if world.first:
            typer.echo(f"interrupted; go on with: mmer-fast train --out {out} --resume", err=True)
        raise typer.Exit(130) from None
    except Terminated as terminated:
        if world.first:
            typer.echo(f"{terminated}; go on with: mmer-fast train --out {out} --resume", err=True)
        raise


def _show(results: dict[str, Any], data: MultiModalData, out: Path, console: Console) -> None:
    title = f"epoch {results['best_epoch']} of {len(results['history'])}, best validation {results['selection']}"
    rows = {name: results[name] for name in ("valid", "test")}
    print_table(console, metrics_table(rows, title, shift_names(data.source)))
    console.print(f"written to {out}; to look at: {out / REPORT_FILE}", soft_wrap=True)


def _stored_run(out: Path, resume: bool) -> RunConfig | None:
    """The configuration of the run to resume; None for a new run. Checks that `out` can serve."""
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out}: expected a directory, got a file")
    if resume and not (out / CONFIG_FILE).exists():
        raise RunError(f"--out {out}: there is no run to resume; leave out --resume to start one")
    if not resume and holds_run(out):
        raise RunError(f"--out {out}: already holds a run; go on with it by --resume, or choose another directory")
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"--out {out}: cannot write to {existing}")
    return RunConfig.read(out) if resume else None


def _modalities(names: str | None, stored: RunConfig | None) -> list[str] | None:
    if names is not None:
        return [name.strip() for name in names.split(",")]
    return list(stored.data["modalities"]) if stored else None


def _model_and_data(
    run: Path, source: str, device: str, needs: Needs
) -> tuple[Network, dict[str, Any], MultiModalData]:
    model, header = load_best(run, choose_device(device))
    return model, header, data_with_notes(model, source, needs)

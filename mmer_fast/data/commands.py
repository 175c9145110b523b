"""The commands of `mmer-fast` for data files: convert, inspect, make-data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmer_fast._console import plain_console, print_table
from mmer_fast.data.containers import MultiModalData
from mmer_fast.data.errors import DataError
from mmer_fast.data.inspection import missing_parts, replace_not_finite, summarise
from mmer_fast.data.loading import FORMATS, GENERATORS, named, read_unchecked, validated
from mmer_fast.data.needs import FEATURES
from mmer_fast.data.npz import write_npz
from mmer_fast.data.safetensors_file import write_safetensors
from mmer_fast.data.synthetic import make_synthetic

OWN_SUFFIXES = (".npz", ".safetensors")
_NAMES = ", ".join(FORMATS)

_GENERATED = ", ".join(f'"{name}"' for name in GENERATORS)

SourceArgument = Annotated[
    str, typer.Argument(metavar="IN", help=f"A data file or folder, or generated: {_GENERATED}.")
]
FormatOption = Annotated[str | None, typer.Option("--format", help=f"What IN is: {_NAMES}. Default: detected from IN.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(convert)
    app.command()(inspect)
    app.command("make-data")(make_data)


def convert(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .npz or .safetensors file.")],
    format: FormatOption = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="Smaller .npz; without it large arrays are mapped, not loaded.")
    ] = False,
    replace_nonfinite: Annotated[
        bool, typer.Option("--replace-nonfinite", help="Set NaN and infinite features to 0 instead of refusing them.")
    ] = False,
) -> None:
    """Write any data set that can be read as .npz or .safetensors."""
    if out.suffix.lower() not in OWN_SUFFIXES:
        raise DataError(f"OUT must end in {' or '.join(OWN_SUFFIXES)}, got {out}")
    found, data = _read(source, format)
    if replace_nonfinite:
        replace_not_finite(data)
    validated(data, FEATURES)
    if out.suffix.lower() == ".npz":
        _write(out, lambda: write_npz(data, out, compress=compress))
    else:
        _write(out, lambda: write_safetensors(data, out))
    console = plain_console()
    sizes = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    _say(console, f"read as {found}; {sizes}; written to {out}")
    for note in (*data.notes, *missing_parts(data)):
        _say(console, f"note: {note}")


def inspect(
    source: SourceArgument,
    format: FormatOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a data set holds; exits with 2 where it cannot be used, and says why."""
    found, data = _read(source, format)
    summary = summarise(data, found)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _show(summary, plain_console())
    if summary["problem"]:
        raise DataError(f"{source}: {summary['problem']}")


def make_data(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file or, for univa, csd and mmin, the new folder.")],
    format: Annotated[str | None, typer.Option("--format", help=f"{_NAMES}. Default: by the suffix of OUT.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same data.")] = 0,
    train: Annotated[int, typer.Option(help="Samples for training.")] = 1600,
    valid: Annotated[int, typer.Option(help="Samples for validation.")] = 400,
    test: Annotated[int, typer.Option(help="Samples for testing.")] = 600,
    max_length: Annotated[int, typer.Option(help="Steps of the longest sequence, at least 8.")] = 50,
    signal: Annotated[float, typer.Option(help="Factor on the strength of what tells the emotions.")] = 1.0,
    units: Annotated[int, typer.Option(help="An emotion has one to so many units in a modality that carries it.")] = 3,
) -> None:
    """Write the embedded synthetic data set in any of the formats that can be read."""
    chosen = named(format or _format_of(out))
    if chosen.suffix and out.suffix.lower() != chosen.suffix:
        raise DataError(f"OUT must end in {chosen.suffix} for the format {chosen.name}, got {out}")
    data = make_synthetic(
        seed, n_train=train, n_valid=valid, n_test=test, max_length=max_length, signal=signal, most_units=units
    )
    _write(out, lambda: chosen.write(data, out))
    _say(plain_console(), f"written to {out} as {chosen.title}")


def _format_of(out: Path) -> str:
    """The format that a suffix stands for, where it stands for one."""
    by_suffix = [format.name for format in FORMATS.values() if format.suffix and format.suffix == out.suffix.lower()]
    if len(by_suffix) != 1:
        raise DataError(f"--format: say which of {', '.join(by_suffix) or _NAMES} to write to {out}")
    return by_suffix[0]


def _read(source: str, format: str | None) -> tuple[str, MultiModalData]:
    """The format's name, and the data as they are."""
    if source in GENERATORS:
        return source, GENERATORS[source](0)
    found, data = read_unchecked(source, format, FEATURES)
    return found.name, data


def _write(out: Path, write: Any) -> None:
    try:
        write()
    except FileExistsError:
        raise DataError(f"{out}: exists already; expected a new folder") from None
    except (OSError, RuntimeError) as error:  # libraries report a full disk as either
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise DataError(f"{out}: cannot be written ({reason})") from error


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


def _show(summary: dict[str, Any], console: Console) -> None:
    _say(console, f"{summary['source']}: {summary['format']}")
    table = Table(title="lengths: shortest / median / longest", title_justify="left")
    for column in ("split", "modality", "N, T, D", "lengths", "missing", "padding", "not finite"):
        table.add_column(column, no_wrap=column in ("N, T, D", "lengths"))
    for name, split in summary["splits"].items():
        for modality, values in split["modalities"].items():
            lengths = values["lengths"]
            table.add_row(
                name,
                modality,
                ", ".join(map(str, values["shape"])),
                f"{lengths['min']} / {lengths['median']:g} / {lengths['max']}",
                str(values["missing"]),
                f"{values['padding']:.0%}",
                str(values["not_finite"]),
            )
    print_table(console, table)
    splits = {name: split for name, split in summary["splits"].items() if split["labelled"]}
    if splits:
        print_table(console, _prevalence(splits, summary["label_names"]))
    for note in summary["notes"]:
        _say(console, f"note: {note}")


def _prevalence(splits: dict[str, Any], label_names: list[str]) -> Table:
    """How frequent each label is in the splits that have labels."""
    table = Table("label", *splits)
    for label in label_names:
        table.add_row(label, *(f"{split['prevalence'].get(label, 0):.1%}" for split in splits.values()))
    table.add_row("none of them", *(f"{split['without_label']:.1%}" for split in splits.values()))
    return table

"""Commands of `mmer-fast` for people who look: report, explain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mmer_fast._console import plain_console
from mmer_fast.data.needs import for_prediction
from mmer_fast.report.document import write_explanation, write_report
from mmer_fast.report.tables import shift_names
from mmer_fast.report.terminal import ExplanationView
from mmer_fast.training.api import Run
from mmer_fast.training.commands import app
from mmer_fast.training.options import (
    DataOption,
    DeviceOption,
    RunOption,
    SplitName,
    SplitOption,
    choose_device,
    data_with_notes,
)
from mmer_fast.training.run import RunError


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished trainings; several are compared.")],
    out: Annotated[Path, typer.Option(help="The .html file to write.")],
    data: Annotated[
        str | None, typer.Option(help="Data in place of what the runs were trained on, with the same labels.")
    ] = None,
    device: DeviceOption = "auto",
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="Run a few training steps to see where their time goes.")
    ] = True,
) -> None:
    """Write one self-contained HTML file about a run, or one that compares several."""
    check_writable(out, ".html")
    write_report(runs, out, data=data, device=choose_device(device), measure_time=timing)
    plain_console().print(f"written to {out}", soft_wrap=True)


@app.command()
def explain(
    run: RunOption,
    data: DataOption,
    sample: Annotated[str, typer.Option(help="Index in the split from 0, or its identifier where the data has any.")],
    split: SplitOption = SplitName.test,
    out: Annotated[Path | None, typer.Option(help="An .html file to write as well.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Show which temporal units of a sample the masks would hide, and what is predicted for it.

    DATA needs only the split of the sample, and no labels.
    """
    if out is not None:
        check_writable(out, ".html")
    opened = Run(run, choose_device(device))
    loaded = data_with_notes(opened.model, data, for_prediction(split.value))
    explanation = opened.explain(sample, loaded, split.value)
    extras = loaded.splits[split.value].extras
    code = str(extras["shift"][explanation.index]) if "shift" in extras else None
    part = None if code is None else shift_names(loaded.source).get(code, f"shift {code}")
    console = plain_console()
    console.print(ExplanationView(explanation, part))
    if out is not None:
        write_explanation(explanation, out, part=part)
        console.print(f"written to {out}", soft_wrap=True)


def check_writable(out: Path, suffix: str) -> None:
    """Refuse a file that cannot be written before anything is computed.

    Raises:
        RunError: another suffix, a directory, or no place to write to.
    """
    if out.suffix.lower() != suffix:
        raise RunError(f"--out must end in {suffix}, got {out}")
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise RunError(f"--out: cannot write {out}")

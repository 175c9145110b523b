"""A training as its user sees it, from the command line and from Python: progress and log while it runs, curves and a
report when it has ended.

The report may take long, so it is no part of the training: other processes do not wait for the one that draws.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmer_fast.data import MultiModalData
from mmer_fast.training.best import only_pretrained
from mmer_fast.training.display import TrainingDisplay, recall_lines
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.observers import Observers, TensorBoardLog
from mmer_fast.training.order import steps_per_epoch
from mmer_fast.training.run import CURVES_FILE, LOG_FILE, RunConfig, train_run
from mmer_fast.training.trainer import Observer

REPORT_FILE, TENSORBOARD_DIRECTORY = "report.html", "tensorboard"


def train_shown(
    config: RunConfig,
    data: MultiModalData,
    directory: Path,
    device: torch.device,
    console: Console,
    *,
    tensorboard: bool = False,
    world: World = ALONE,
) -> dict[str, Any]:
    """Train, or go on training, in a directory, showing progress.

    Args:
        config: of the run.
        data: as `config` describes it.
        directory: existing.
        device: to train on.
        console: for progress.
        tensorboard: log for TensorBoard too.
        world: the processes that train together, each of which calls this; the first shows and writes.

    Returns:
        What is in `metrics.json`.

    Raises:
        TrainingError, CheckpointError, WorldError: as `train_run`.
        RunError: as `train_run`, or tensorboard is missing.
    """
    if not world.first:
        return train_run(config, data, directory, device, Observers([]), world)
    steps = steps_per_epoch(data.splits["train"], config.train, config.kind.network.group)
    with ExitStack() as stack:
        observers: list[Observer] = []
        if tensorboard:
            names, every = config.kind.losses, config.train.log_every
            log = TensorBoardLog(directory / TENSORBOARD_DIRECTORY, names, steps, every)
            observers.append(stack.enter_context(log))
        epochs, losses = config.train.epochs, config.kind.losses
        display = stack.enter_context(TrainingDisplay(console, directory / LOG_FILE, epochs, steps, losses))
        others = f", {world.size} processes" if world.group is not None else ""
        sizes = ", ".join(f"{name} {size}" for name, size in config.data["modalities"].items())
        display.say(f"{data.source}: {len(data.splits['train'])} training samples; {sizes}; on {device}{others}")
        for note in data.notes:
            display.say(f"note: {note}")
        results = train_run(config, data, directory, device, Observers([display, *observers]), world)
        ended, training = len(results["history"]), config.train
        if ended < training.epochs:
            reason = f"no better validation {training.selection} in {training.patience} epochs"
            display.say(f"stopped early after epoch {ended} of {training.epochs}: {reason}")
        if pretrained := only_pretrained(results["history"]):
            display.say(f"note: {pretrained}")
        for line in recall_lines(results["mask_recall"]):
            display.say(line)
    return results


def draw(results: dict[str, Any], data: MultiModalData, directory: Path, world: World = ALONE) -> None:
    """Draw the curves of a run that has ended and write its report; nothing is exchanged with other processes.

    Args:
        results: of `train_shown`.
        data, directory: it had.
        world: the processes that have trained the run, which may have ended; the first calls this.

    Raises:
        WriteError: a file cannot be written.
    """
    from mmer_fast.report import plot_curves, write_report  # matplotlib only where something is drawn

    plot_curves(results["history"], directory / CURVES_FILE, best_epoch=results["best_epoch"])
    write_report([directory], directory / REPORT_FILE, data=data, device=world.device, world=world)

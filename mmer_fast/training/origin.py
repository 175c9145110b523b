"""Where the best weights of a run come from: an entry of the header of their file, and the same in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmer_fast._version import __version__
from mmer_fast.training.loop_config import LoopConfig

ORIGIN = "training"
"""Name of the entry. Files from before there was one lack it."""


def origin(record: Mapping[str, Any], config: LoopConfig, steps_per_epoch: int) -> dict[str, Any]:
    """The entry: epoch and steps of the optimizer so far, both from 1, what selected the weights, and our version.

    Args:
        record: of the history, of the epoch after which the weights are taken.
        config: of the training.
        steps_per_epoch: of it.
    """
    return {
        "epoch": record["epoch"],
        "step": record["epoch"] * steps_per_epoch,
        "selection": config.selection,
        "value": record["valid"][config.selection],
        "version": __version__,
    }


def origin_in_words(header: Mapping[str, Any]) -> str:
    """As "epoch 7, step 140, validation micro_f1 0.5123, mmer_fast 0.1.0"; "" for the header of an older file."""
    entry = header.get(ORIGIN)
    if entry is None:
        return ""
    value = "none" if entry["value"] is None else f"{entry['value']:.4f}"
    place = f"epoch {entry['epoch']}, step {entry['step']}"
    return f"{place}, validation {entry['selection']} {value}, mmer_fast {entry['version']}"

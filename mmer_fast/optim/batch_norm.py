"""Batch normalisation in a second pass over the same batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_batch_statistics(module: nn.Module) -> Iterator[None]:
    """Inside the block batch normalisation uses the batch's statistics, but does not add them to its running ones.

    The perturbed pass of SAM or APP sees the batch a second time, with weights that the model never has afterwards.
    Layers in eval mode go on using their running statistics. The running statistics are not touched at all, so that a
    pass that overflows leaves no NaN in them, and a state dict taken inside holds the right ones.

    Args:
        module: whose ``BatchNorm*d`` layers, ``SyncBatchNorm`` too, are meant.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True

"""The learning rate as a function of the step: linear warm-up, then a cosine to zero."""

from __future__ import annotations

import math

from mmer_fast.training.loop_config import LoopConfig


def learning_rate(config: LoopConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimiser step `step`, counted from 0 over the whole training.

    With `schedule="iteration"` the position is the step itself. With "epoch" it is the number of the epoch
    before (0 in the first two epochs), because the published code advances its schedule by that number at the
    end of each epoch.
    """
    if config.schedule == "iteration":
        position, total = step, config.epochs * steps_per_epoch
    else:
        position, total = max(step // steps_per_epoch - 1, 0), config.epochs
    if position < config.warmup:
        share = config.warmup_start + (1 - config.warmup_start) * position / config.warmup
    else:
        share = 0.5 * (1 + math.cos(math.pi * (position - config.warmup) / (total - config.warmup)))
    return config.learning_rate * share

"""Optimizers on the weight perturbation: sharpness-aware minimization, SAM and ASAM."""

from mmer_fast.optim.batch_norm import frozen_batch_statistics
from mmer_fast.optim.sam import SAM

__all__ = ["SAM", "frozen_batch_statistics"]

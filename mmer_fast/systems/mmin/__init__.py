"""MMIN: emotions from whatever modalities are there, by imagining those that are missing."""

from mmer_fast.systems.mmin.conditions import condition_masks, missing_conditions, restricted, unified
from mmer_fast.systems.mmin.config import ABLATIONS, MMINConfig
from mmer_fast.systems.mmin.imagination import Autoencoder, CascadeResidualAutoencoder, Imagination, Imagined
from mmer_fast.systems.mmin.losses import imagination_loss
from mmer_fast.systems.mmin.model import MMIN

__all__ = [
    "ABLATIONS",
    "MMIN",
    "Autoencoder",
    "CascadeResidualAutoencoder",
    "Imagination",
    "Imagined",
    "MMINConfig",
    "condition_masks",
    "imagination_loss",
    "missing_conditions",
    "restricted",
    "unified",
]

"""MMIN: emotions from whatever modalities are there, by imagining those that are missing."""

from mmer_fast.systems.mmin.conditions import condition_masks, missing_conditions, restricted, unified
from mmer_fast.systems.mmin.config import ABLATIONS, MMINConfig
from mmer_fast.systems.mmin.evaluation import ConditionTable, evaluate_conditions
from mmer_fast.systems.mmin.imagination import Autoencoder, CascadeResidualAutoencoder, Imagination, Imagined
from mmer_fast.systems.mmin.losses import imagination_loss
from mmer_fast.systems.mmin.model import MMIN

__all__ = [
    "ABLATIONS",
    "MMIN",
    "Autoencoder",
    "CascadeResidualAutoencoder",
    "ConditionTable",
    "Imagination",
    "Imagined",
    "MMINConfig",
    "condition_masks",
    "evaluate_conditions",
    "imagination_loss",
    "missing_conditions",
    "restricted",
    "unified",
]

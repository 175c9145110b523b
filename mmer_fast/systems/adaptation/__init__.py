"""Recognition across cultures, and with few labels: the talk's shorter items."""

from mmer_fast.systems.adaptation.config import CrossCultureConfig, FusionConfig, SemiSupervisedConfig
from mmer_fast.systems.adaptation.cross_culture import CrossCulture
from mmer_fast.systems.adaptation.culture import UNKNOWN, CultureClassifier, culture_loss
from mmer_fast.systems.adaptation.matching import cross_modal_matching, maximum_mean_discrepancy, moment_discrepancy
from mmer_fast.systems.adaptation.semi_supervised import SemiSupervised, hide_labels

__all__ = [
    "UNKNOWN",
    "CrossCulture",
    "CrossCultureConfig",
    "CultureClassifier",
    "FusionConfig",
    "SemiSupervised",
    "SemiSupervisedConfig",
    "cross_modal_matching",
    "culture_loss",
    "hide_labels",
    "maximum_mean_discrepancy",
    "moment_discrepancy",
]

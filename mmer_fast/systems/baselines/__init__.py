"""The baselines of RobMMR's Table 1: classical methods over pooled features, and networks over sequences."""

from mmer_fast.systems.baselines.classical import BR, CC, LP, METHODS, Classical, ClassicalConfig, fit, load
from mmer_fast.systems.baselines.hhmpn import HHMPN, HHMPNConfig
from mmer_fast.systems.baselines.label_graph import label_graph
from mmer_fast.systems.baselines.lstm import LSTM, LSTMConfig
from mmer_fast.systems.baselines.mult import MulT, MulTConfig, future_bias
from mmer_fast.systems.baselines.pooled import Pooling
from mmer_fast.systems.baselines.refinement import ModalityDiscriminator, adversarial_loss, orthogonal_loss
from mmer_fast.systems.baselines.tailor import TAILOR, TAILORConfig

__all__ = [
    "BR",
    "CC",
    "HHMPN",
    "LP",
    "LSTM",
    "METHODS",
    "TAILOR",
    "Classical",
    "ClassicalConfig",
    "HHMPNConfig",
    "LSTMConfig",
    "ModalityDiscriminator",
    "MulT",
    "MulTConfig",
    "Pooling",
    "TAILORConfig",
    "adversarial_loss",
    "fit",
    "future_bias",
    "label_graph",
    "load",
    "orthogonal_loss",
]

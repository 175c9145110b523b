"""MMGCN (J. Hu et al., ACL 2021): multi-modal fusion by a deep graph network over the utterances of dialogues."""

from mmer_fast.systems.mmgcn.config import MMGCNConfig
from mmer_fast.systems.mmgcn.encoders import UtteranceEncoder
from mmer_fast.systems.mmgcn.gcnii import GCNII, GCNIILayer
from mmer_fast.systems.mmgcn.graph import DialogueGraph, angular_similarity, dialogue_graph
from mmer_fast.systems.mmgcn.layout import DialogueLayout
from mmer_fast.systems.mmgcn.losses import authors_focal_loss, class_weights, focal_loss, parameter_penalty
from mmer_fast.systems.mmgcn.model import MMGCN
from mmer_fast.systems.mmgcn.presets import PRESETS

__all__ = [
    "GCNII",
    "MMGCN",
    "PRESETS",
    "DialogueGraph",
    "DialogueLayout",
    "GCNIILayer",
    "MMGCNConfig",
    "UtteranceEncoder",
    "angular_similarity",
    "authors_focal_loss",
    "class_weights",
    "dialogue_graph",
    "focal_loss",
    "parameter_penalty",
]

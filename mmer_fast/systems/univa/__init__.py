"""UniVA (Zheng, Yu and Xia 2024): contrastive learning of each modality by valence and arousal."""

from mmer_fast.systems.univa.config import UniVAConfig
from mmer_fast.systems.univa.contrastive import va_contrastive_loss
from mmer_fast.systems.univa.emotion_prior import (
    column_norm_prior,
    emotion_similarity,
    emotion_va,
    squared_difference_prior,
)
from mmer_fast.systems.univa.encoder import AdditivePooling, UnimodalEncoder
from mmer_fast.systems.univa.model import UniVA
from mmer_fast.systems.univa.objective import UniVAObjective
from mmer_fast.systems.univa.recognition import softmax_label_kl

__all__ = [
    "AdditivePooling",
    "UniVA",
    "UniVAConfig",
    "UniVAObjective",
    "UnimodalEncoder",
    "column_norm_prior",
    "emotion_similarity",
    "emotion_va",
    "softmax_label_kl",
    "squared_difference_prior",
    "va_contrastive_loss",
]

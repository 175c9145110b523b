"""UniVA (Zheng, Yu and Xia 2024): contrastive learning of each modality by valence and arousal."""

from mmer_fast.systems.univa.contrastive import va_contrastive_loss
from mmer_fast.systems.univa.emotion_prior import (
    column_norm_prior,
    emotion_similarity,
    emotion_va,
    squared_difference_prior,
)

__all__ = [
    "column_norm_prior",
    "emotion_similarity",
    "emotion_va",
    "squared_difference_prior",
    "va_contrastive_loss",
]

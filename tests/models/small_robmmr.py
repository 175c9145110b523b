"""A small RobMMR in float64."""

from __future__ import annotations

import torch

from mmer_fast.models import RobMMR, RobMMRConfig

MODALITIES = {"words": 5, "frames": 3}
LABELS = 4


def small_config(**changes: object) -> RobMMRConfig:
    values = {
        "dim": 8,
        "ffn_dim": 12,
        "heads": 2,
        "unimodal_blocks": 1,
        "multimodal_blocks": 1,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return RobMMRConfig(**{**values, **changes})


def small_model(**changes: object) -> RobMMR:
    torch.manual_seed(0)
    return RobMMR(MODALITIES, LABELS, small_config(**changes)).double()

"""UniVA's settings under a name: ours for a CPU, those of the slides, and those published for data and text features.

The published schedule falls linearly after a warm-up over a tenth of all steps. Here it falls as a cosine, after as
many steps as a tenth is on the published data. AdamW, weight decay 0 and the clipped gradient are as published.
"""

from __future__ import annotations

from typing import Any

from mmer_fast.systems.interface import Preset

_CODE: dict[str, Any] = {
    "va_scaling": "valence",
    "normalize": False,
    "views": 2,
    "contrast_reduction": "mean",
    "prior": "column_norm",
    "trainable_similarity": True,
}
_MOSEI: dict[str, Any] = {"contrast_weights": {"text": 3.0}}
_M3ED: dict[str, Any] = {"emotions": "happy+surprise+sad+disgust+anger+fear+neutral"}
_TRAIN: dict[str, Any] = {"weight_decay": 0.0, "clip_norm": 1.0, "threshold": 0.18, "warmup_start": 0.0}


def _blocks(text: int, audio: int, video: int) -> dict[str, Any]:
    return {"blocks": {"text": text, "audio": audio, "video": video}}


def _train(epochs: int, batch_size: int, learning_rate: float, warmup: int) -> dict[str, Any]:
    values = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "warmup": warmup}
    return {**_TRAIN, **values}


_MOSEI_GLOVE = _train(15, 32, 7e-5, 766)

PRESETS = {
    "compact": Preset(
        {"dim": 64, "ffn_dim": 128, "heads": 4, "blocks": 1, "standardize": True},
        {"epochs": 15, "batch_size": 64, "learning_rate": 1e-3, "threshold": 0.18},
    ),
    "slides": Preset(_blocks(7, 3, 5), _MOSEI_GLOVE),
    # The published command of MOSEI with GloVe leaves the prior out; the three others have it.
    "authors": Preset(
        {**_CODE, **_MOSEI, **_blocks(7, 3, 5), "temperature": 0.4, "alpha": 0.2, "prior": "none"}, _MOSEI_GLOVE
    ),
    "authors_roberta": Preset(
        {**_CODE, **_MOSEI, **_blocks(0, 5, 3), "temperature": 0.7, "alpha": 0.45}, _train(5, 48, 5e-5, 170)
    ),
    "authors_m3ed": Preset(
        {**_CODE, **_M3ED, **_blocks(3, 5, 3), "temperature": 0.4, "alpha": 0.1}, _train(15, 32, 5e-5, 817)
    ),
    "authors_m3ed_roberta": Preset(
        {**_CODE, **_M3ED, **_blocks(0, 5, 3), "temperature": 0.4, "alpha": 0.2}, _train(10, 88, 5e-5, 199)
    ),
}
"""Text features are GloVe's, with "_roberta" the hidden states of RoBERTa, which is not trained with it here."""

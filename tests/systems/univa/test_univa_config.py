"""UniVA's configuration and its presets."""

from __future__ import annotations

from typing import Any

import pytest
from small_univa import NAMES, small_config

from mmer_fast.models.config import config_from_dict
from mmer_fast.systems.univa import (
    UniVA,
    UniVAConfig,
)


@pytest.mark.parametrize("name", UniVA.presets)
def test_presets_are_configurations(name: str) -> None:
    preset = UniVA.presets[name]
    config = config_from_dict(UniVAConfig, preset.model)
    assert {config.blocks_of(modality) for modality in NAMES} <= set(range(8))
    assert "threshold" in preset.train


def test_published_weights() -> None:
    """Temperature and α of MOSEI and M³ED, with RoBERTa and GloVe."""
    published = {"authors_roberta": (0.7, 0.45), "authors": (0.4, 0.2)}
    published |= {"authors_m3ed_roberta": (0.4, 0.2), "authors_m3ed": (0.4, 0.1)}
    for name, expected in published.items():
        model = UniVA.presets[name].model
        assert (model["temperature"], model["alpha"]) == expected
        assert (model.get("contrast_weights") == {"text": 3.0}) == ("m3ed" not in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"heads": 5}, "heads must be a divisor of dim=12, got 5"),
        ({"encoder": "lstm", "dim": 9, "heads": 3}, "dim must be even with an LSTM or sinusoidal positions, got 9"),
        ({"blocks": -1}, "blocks must be at least 0, or modality → such a number, got -1"),
        ({"blocks": {"text": 1.5}}, "blocks must be at least 0, or modality"),
        ({"alpha": 1.0}, r"alpha must be in \[0, 1\), got 1.0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"views": 3}, r"views must be Literal\[1, 2\], got 3"),
        ({"contrast_weights": {"text": -1}}, "contrast_weights must be None, or modality → a number of at least 0"),
        ({"prior_weight": -1.0}, "prior_weight must be at least 0"),
        ({"emotions": "sad+sad"}, r"emotions must be names, each once, got 'sad\+sad'"),
        ({"emotions": "joy+sad"}, r"emotions: .*got joy without; known: happy, .*emotion_va gives values"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_weights_without_a_contrast_have_no_effect() -> None:
    small_config(contrast=False, contrast_weights={"txt": 3.0}).check_weights(NAMES)
    with pytest.raises(ValueError, match=r"among text, video, audio, got .*'txt'"):
        small_config(contrast_weights={"txt": 3.0}).check_weights(NAMES)


def test_equal_configurations_are_one_key() -> None:
    """As ablations need it, which look for runs of the same settings."""
    blocks = {"text": 1, "audio": 2}
    emotion_va = {"joy": [0.9, 0.8]}
    first = small_config(blocks=blocks, emotion_va=emotion_va)
    same = small_config(blocks=dict(reversed(blocks.items())), emotion_va=emotion_va)
    assert {first: 1}[same] == 1
    assert small_config(blocks={"text": 2, "audio": 1}, emotion_va=emotion_va) not in {first: 1}


def test_names_without_values_do_without_the_prior() -> None:
    assert small_config(emotions="joy+sad", prior="none").emotion_names == ["joy", "sad"]

"""What a network of a system would be is known, and what it cannot be refused, before there is a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmer_fast.data import MultiModalData
from mmer_fast.systems import SystemModel
from mmer_fast.systems.registry import NAMES, SISTERS
from mmer_fast.training.systems import find_system


@pytest.mark.parametrize("name", NAMES)
def test_no_network_is_built_to_check_data(
    name: str, data_of: Callable[[str], MultiModalData], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = find_system(name)

    def build(*_: object) -> None:
        raise AssertionError("a network is built")

    monkeypatch.setattr(kind.network, "__init__", build)
    before = torch.get_rng_state()
    kind.check_data(data_of(name), *kind.preset("compact"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SISTERS)
def test_an_outline_says_what_the_network_says(name: str, data_of: Callable[[str], MultiModalData]) -> None:
    data = data_of(name)
    kind = find_system(name)
    assert issubclass(kind.network, SystemModel)
    sizes, config = (data.modalities, len(data.label_names)), kind.preset("compact")[0]
    outline, network = kind.network.outline(*sizes, config), kind.build(*sizes, config)
    assert type(outline) is type(network)
    assert not list(outline.modules())[1:]
    for fact in ("modalities", "labels", "config", "outputs", "input_extras", "training_extras", "group"):
        assert getattr(outline, fact) == getattr(network, fact), fact


@pytest.mark.parametrize(
    ("name", "modalities", "count", "changes", "message"),
    [
        ("mmgcn", {"audio": 4}, 0, {}, "labels must be at least 1"),
        ("m3er", {"a.b": 4, "video": 3}, 3, {}, "modality 'a.b' cannot name a submodule"),
        ("lstm", {"type": 4}, 3, {}, "or be an attribute of torch.nn.ModuleDict"),
        ("br", {"audio": 0}, 3, {}, "a size of at least 1"),
        ("lstm", {}, 3, {}, "at least one name"),
        ("mult", {"audio": 4}, 3, {}, "modalities must be at least two for MulT, got audio"),
        ("mmin", {"audio": 4}, 3, {}, "modalities must be at least two for one to be missing, got audio"),
        ("mmin", {"audio": 4, "video": 3}, 3, {"text_cnn": "words"}, "text_cnn must be some of audio, video"),
        ("semi-supervised", {"audio": 4}, 3, {"text_cnn": "words"}, "text_cnn must be some of audio"),
        ("univa", {"audio": 4}, 6, {"blocks": {"text": 1}}, "a mapping that has 'audio'"),
        ("univa", {"audio": 4}, 7, {}, "emotions must name the 7 labels, got 6"),
        (
            *("univa", {"audio": 4, "text": 3}, 6, {"contrast_weights": {"text": 1, "txt": 3}}),
            "contrast_weights must be None, or weights of modalities among audio, text, got {'text': 1, 'txt': 3}",
        ),
        (
            *("univa", {"audio": 4}, 2, {"emotions": "happy+sad", "emotion_va": {"sad": [1.0, 0.2]}}),
            "va_k2 must differ among emotions",
        ),
    ],
)
def test_an_outline_refuses_what_the_constructor_refuses(
    name: str, modalities: dict[str, int], count: int, changes: dict[str, Any], message: str
) -> None:
    kind = find_system(name)
    assert issubclass(kind.network, SystemModel)
    config = replace(kind.preset("compact")[0], **changes)
    with pytest.raises(ValueError) as built:
        kind.build(modalities, count, config)
    with pytest.raises(ValueError) as outlined:
        kind.network.outline(modalities, count, config)
    assert message in str(outlined.value)
    assert str(built.value) == str(outlined.value)

"""UniVA as a network: pooling, ragged and missing modalities, other encoders, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_univa import SMALL, batch_of, built, small_config, small_data
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.data import DataError, MultiModalData, SequenceDataset
from mmer_fast.models.outputs import LABELS
from mmer_fast.systems.univa import (
    AdditivePooling,
    UniVA,
)


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return small_data()


def test_additive_pooling() -> None:
    lengths = [3, 0, 1]
    pooling = AdditivePooling(4).double()
    tokens = torch.randn(4, 4, dtype=torch.float64)
    pooled = pooling(tokens, mf.packed_layout(torch.tensor(lengths)))
    start = 0
    for length, got in zip(lengths, pooled, strict=True):
        own = tokens[start : start + length]
        start += length
        scores = [pooling.score(torch.tanh(pooling.of_tokens(x) + pooling.of_query(pooling.query))) for x in own]
        weights = [math.exp(score.item()) for score in scores]
        expected = sum((w / sum(weights) * x for w, x in zip(weights, own, strict=True)), torch.zeros(4))
        torch.testing.assert_close(got, expected.double())


@pytest.mark.parametrize("names", [["text"], ["audio", "text"]])
def test_subsets_of_the_modalities(data: MultiModalData, names: list[str]) -> None:
    chosen = data.select(names)
    result = built(chosen).objective(batch_of(chosen))
    result.total.backward()
    assert result.logits.shape == (20, 6)


VARIANTS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "lstm": {"encoder": "lstm", "positions": "sinusoidal"},
    "no blocks": {"blocks": {"text": 0, "video": 1, "audio": 2}, "positions": "none"},
    "mean": {"pooling": "mean", "activation": "relu", "standardize": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_other_samples_change_nothing(data: MultiModalData, variant: str) -> None:
    model = built(data, **VARIANTS[variant]).eval()
    batch = batch_of(data)
    expected = model.logits(batch)
    assert expected.isfinite().all()
    for name, x in batch.features.items():
        padding = torch.arange(x.shape[1]) >= batch.lengths[name][:, None]
        batch.features[name] = F.pad(x.masked_fill(padding[..., None], torch.nan), (0, 0, 0, 2), value=torch.nan)
    assert torch.equal(model.logits(batch), expected)
    alone = SequenceDataset(data.splits["test"])[3]
    torch.testing.assert_close(model.logits(alone)[0], expected[3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_and_a_batch_without_a_modality_passes(data: MultiModalData, variant: str) -> None:
    model = built(data, **VARIANTS[variant])
    model.objective(batch_of(data)).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.zero_grad()
    batch = batch_of(data)
    batch.lengths["text"].zero_()
    result = model.objective(batch)
    result.total.backward()
    assert result.total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is not None for p in model.encoders["audio"].parameters())


def test_features_are_standardised_where_asked_for(data: MultiModalData) -> None:
    train, batch = data.splits["train"], batch_of(data)
    expected, twin = built(data, standardize=True).logits(batch), built(data)
    for name, x_ntf in train.features.items():
        units = torch.from_numpy(x_ntf[np.arange(8) < train.lengths[name][:, None]]).double()
        batch.features[name] = ((batch.features[name] - units.mean(dim=0)) / units.std(dim=0, correction=0)).float()
    torch.testing.assert_close(twin.logits(batch), expected)


def test_attention_has_a_dropout_of_its_own(data: MultiModalData) -> None:
    batch = batch_of(data)
    for rate in (0.0, 0.5):
        model = built(data, attention_dropout=rate)
        assert torch.equal(model.logits(batch), model.logits(batch)) is (rate == 0)


def test_encoders_of_your_own(data: MultiModalData) -> None:
    class FirstToken(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.linear = nn.Linear(size, SMALL["dim"])

        def forward(self, x_btf: Tensor, lengths_b: Tensor) -> Tensor:
            return self.linear(x_btf[:, 0])

    encoders = {name: FirstToken(size) for name, size in data.modalities.items()}
    model = UniVA(data.modalities, 6, small_config(), encoders=encoders)
    model.fit(data.splits["train"])
    model.objective(batch_of(data)).total.backward()
    assert all(encoder.linear.weight.grad is not None for encoder in encoders.values())
    with pytest.raises(ValueError, match="encoders must be those of text, video, audio, got text"):
        UniVA(data.modalities, 6, small_config(), encoders={"text": encoders["text"]})


def test_a_saved_model_predicts_the_same(data: MultiModalData) -> None:
    model = built(data, standardize=True, va_scaling="standard", trainable_similarity=True)
    again = UniVA(data.modalities, 6, model.config)
    again.load_state_dict(model.state_dict())
    batch = batch_of(data)
    assert torch.equal(again.objective(batch).total, model.objective(batch).total)


def test_outputs() -> None:
    assert UniVA({"a": 2}, 6, small_config(recognition="bce")).outputs == LABELS
    outputs = UniVA({"a": 2}, 6, small_config()).outputs
    assert (outputs.activation, outputs.decision) == ("softmax", "threshold")


def test_data_that_is_refused(data: MultiModalData) -> None:
    config = small_config()
    UniVA.check_data(data, config)
    numbered = replace(data, label_names=[f"label_{k}" for k in range(6)])
    UniVA.check_data(numbered, config)
    other = replace(data, label_names=["joy", *data.label_names[1:]])
    with pytest.raises(DataError, match=r"label_names: expected those of .*emotions, happy, .*; got joy, sad"):
        UniVA.check_data(other, config)
    UniVA.check_data(other, small_config(prior="none"))
    joy = {"emotions": "joy+sad+anger+surprise+disgust+fear", "emotion_va": {"joy": [0.9, 0.8]}}
    UniVA.check_data(other, small_config(**joy))
    train = data.splits["train"]
    without = replace(train, extras={"va_text": train.extras["va_text"]})
    with pytest.raises(DataError, match=r"train extras: expected va_video, valence and arousal .*; got va_text\."):
        UniVA.check_data(replace(data, splits={**data.splits, "train": without}), config)
    for wrong in (np.zeros((40, 3)), np.zeros((40, 2), dtype=np.int64), np.full((40, 2), np.nan)):
        damaged = replace(train, extras={**train.extras, "va_audio": wrong})
        with pytest.raises(DataError, match=r"train extras va_audio: expected finite .* of shape \(40, 2\)"):
            UniVA.check_data(replace(data, splits={**data.splits, "train": damaged}), config)
        UniVA.check_data(replace(data, splits={**data.splits, "train": damaged}), small_config(contrast=False))


def test_samples_longer_than_the_learned_positions_are_refused(data: MultiModalData) -> None:
    longest = int(data.splits["valid"].lengths["video"].max())
    short = {name: split for name, split in data.splits.items() if name == "valid"}
    for check in (UniVA.check_data, UniVA.check_inputs):
        with pytest.raises(DataError, match=r"train text: .* at most UniVAConfig\.max_length=3, .*; got 8: raise"):
            check(data, small_config(max_length=3))
        check(data, small_config(max_length=3, positions="sinusoidal"))
        check(data, small_config(max_length=8))
    UniVA.check_inputs(replace(data, splits=short), small_config(max_length=longest))


def test_errors_of_the_model(data: MultiModalData) -> None:
    with pytest.raises(ValueError, match=r"UniVAConfig\.emotions must name the 7 labels, got 6: happy\+sad"):
        UniVA({"a": 2}, 7, small_config())
    UniVA({"a": 2}, 7, small_config(prior="none"))
    with pytest.raises(ValueError, match=r"UniVAConfig\.blocks must be a number or a mapping that has 'a'"):
        UniVA({"a": 2}, 6, small_config(blocks={"b": 1}))
    model = built(data, max_length=3)
    with pytest.raises(ValueError, match=r"at most UniVAConfig\.max_length=3 with learned positions, got 6"):
        model.logits(batch_of(data))
    batch = batch_of(data)
    del batch.extras["va_audio"]
    with pytest.raises(ValueError, match=r"va must hold modality 'audio' .*, got \['text', 'video'\]"):
        built(data).objective(batch)

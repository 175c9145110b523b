"""What holds for every network of the package."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from small_baselines import CONFIGS, LABELS, LENGTHS, MODALITIES, NETWORKS, learnable_data, small_model, whole

from mmer_fast.data import Batch
from mmer_fast.models.config import config_from_dict
from mmer_fast.systems.baselines import HHMPN, LSTM, TAILOR, MulT
from mmer_fast.systems.baselines.base import Baseline

each_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
SWITCHES = [
    (LSTM, {"summary": "last"}),
    (LSTM, {"summary": "mean", "layers": 2}),
    (MulT, {"mask": "none"}),
    (MulT, {"self_attention": False}),
    (HHMPN, {"label_messages": False}),
    (HHMPN, {"modality_weights": "mean"}),
    (HHMPN, {"graph": "complete"}),
    (TAILOR, {"fusion": "joint"}),
    (TAILOR, {"adversarial_weight": 0.0, "orthogonal_weight": 0.0, "common_weight": 0.0}),
]
each_variant = pytest.mark.parametrize(
    ("network", "changes"),
    [*((network, {}) for network in NETWORKS), *SWITCHES],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(f"{k}={v}" for k, v in value.items()),
)


def alone(batch: Batch, sample: int) -> Batch:
    """One sample, without any padding but one unit."""
    features = {name: x[sample : sample + 1, : max(1, LENGTHS[name][sample])] for name, x in batch.features.items()}
    lengths = {name: x[sample : sample + 1] for name, x in batch.lengths.items()}
    return Batch(features, lengths, batch.labels[sample : sample + 1], batch.index[sample : sample + 1])


@each_variant
def test_a_sample_is_predicted_as_if_it_were_alone(network: type[Baseline], changes: dict, batch: Batch) -> None:
    model = small_model(network, **changes)
    logits = model.logits(batch)
    assert logits.shape == (5, LABELS)
    singly = torch.cat([model.logits(alone(batch, i)) for i in range(5)])
    torch.testing.assert_close(logits, singly, rtol=1e-9, atol=1e-11)
    assert logits.unique(dim=0).shape == (5, LABELS)  # and they differ


@each_variant
def test_padding_may_hold_anything(network: type[Baseline], changes: dict, batch: Batch) -> None:
    model = small_model(network, **changes)
    clean = model.objective(batch)
    clean_gradients = torch.autograd.grad(clean.total, list(model.parameters()), allow_unused=True)
    for name, x_btf in batch.features.items():
        padding_bt = torch.arange(x_btf.shape[1]) >= batch.lengths[name][:, None]
        batch.features[name] = x_btf.masked_fill(padding_bt[..., None], torch.nan)
    dirty = model.objective(batch)
    assert torch.equal(dirty.logits, clean.logits)
    assert torch.equal(dirty.parts, clean.parts)
    dirty_gradients = torch.autograd.grad(dirty.total, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(dirty_gradients, clean_gradients, rtol=0, atol=0)


@each_network
def test_every_parameter_learns_from_a_batch_with_everything(network: type[Baseline], batch: Batch) -> None:
    model = small_model(network)
    model.objective(alone(batch, 0)).total.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()


@each_network
def test_a_batch_without_any_unit_trains(network: type[Baseline], batch: Batch) -> None:
    model = small_model(network)
    empty = alone(batch, 3)
    assert all(not lengths.any() for lengths in empty.lengths.values())
    objective = model.objective(empty)
    objective.total.backward()
    assert objective.parts.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad.any() for p in model.parameters() if p.grad is not None)


@each_network
def test_parts_are_named_and_detached(network: type[Baseline], batch: Batch) -> None:
    objective = small_model(network).objective(batch)
    assert objective.parts.shape == (len(network.loss_names),)
    assert not objective.parts.requires_grad
    assert not objective.logits.requires_grad
    expected = torch.nn.functional.binary_cross_entropy_with_logits(objective.logits, batch.labels)
    torch.testing.assert_close(objective.parts[0], expected)


@each_network
def test_it_learns_a_small_set_and_beats_the_prevalence(network: type[Baseline]) -> None:
    data = learnable_data()
    train, valid = whole(data.splits["train"]), whole(data.splits["valid"])
    torch.manual_seed(0)
    model = network(MODALITIES, LABELS, CONFIGS[network])
    model.fit(data.splits["train"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.objective(train).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model.logits(valid), valid.labels)
    prevalence = train.labels.mean(dim=0).expand_as(valid.labels)
    trivial = torch.nn.functional.binary_cross_entropy(prevalence, valid.labels)
    assert loss < 0.75 * trivial


@each_network
def test_what_fit_takes_is_saved_with_the_weights(network: type[Baseline], batch: Batch) -> None:
    data = learnable_data()
    model = small_model(network)
    before = model.logits(batch)
    model.fit(data.splits["train"])
    fitted = model.logits(batch)
    assert not torch.allclose(before, fitted)
    again = small_model(network)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.logits(batch), fitted)


@each_network
def test_features_may_have_any_scale(network: type[Baseline]) -> None:
    data = learnable_data()
    model, other = small_model(network), small_model(network)
    model.fit(data.splits["train"])
    plain = model.logits(double(whole(data.splits["valid"])))
    for split in data.splits.values():
        split.features["frames"] *= 1024
    other.fit(data.splits["train"])
    scaled = other.logits(double(whole(data.splits["valid"])))
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)


def double(batch: Batch) -> Batch:
    return Batch({name: x.double() for name, x in batch.features.items()}, batch.lengths, batch.labels, batch.index)


@each_network
@pytest.mark.parametrize("preset", ["compact", "authors"])
def test_presets_are_configurations(network: type[Baseline], preset: str) -> None:
    config = config_from_dict(network.config_class, dict(network.presets[preset].model))
    assert config_from_dict(network.config_class, json.loads(json.dumps(asdict(config)))) == config
    with torch.device("meta"):
        network(MODALITIES, LABELS, config)


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        *((network, {"dim": 0}, "dim must be at least 1, got 0") for network in NETWORKS),
        *((network, {"dim": 2.5}, "dim must be int, got 2.5") for network in NETWORKS),
        *((network, {"nothing": 1}, "unknown .* field") for network in NETWORKS),
        *((network, {"heads": 3}, "heads must be a divisor of dim=.*, got 3") for network in (MulT, HHMPN, TAILOR)),
        *(
            (network, {rate: 1.0}, rf"{rate} must be in \[0, 1\), got 1.0")
            for network in NETWORKS
            for rate in asdict(CONFIGS[network])
            if rate.endswith("dropout")
        ),
        (LSTM, {"dim": 7}, "dim must be even, got 7"),
        (MulT, {"dim": 7, "heads": 1}, "dim must be even, got 7"),
        (MulT, {"levels": 0}, "levels must be at least 1, got 0"),
        (HHMPN, {"graph_threshold": 1.5}, r"graph_threshold must be in \[0, 1\], got 1.5"),
        (TAILOR, {"common_weight": -1.0}, "common_weight must be at least 0, got -1.0"),
    ],
)
def test_configurations_that_make_no_sense(network: type[Baseline], change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(network.config_class, {**asdict(CONFIGS[network]), **change})


@each_network
def test_a_batch_of_other_modalities_is_refused(network: type[Baseline], batch: Batch) -> None:
    model = small_model(network)
    batch.features["frames"] = batch.features["frames"][..., :2]
    with pytest.raises(ValueError, match=r"features\['frames'\] must have shape \(B, T, 3\), got \(5, 4, 2\)"):
        model.logits(batch)
    with pytest.raises(ValueError, match="labels must be at least 1, got 0"):
        network(MODALITIES, 0, CONFIGS[network])

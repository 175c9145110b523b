"""Semi-supervised recognition: its losses, and that labels that are hidden are not read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_adaptation import CLASSES, batch_of, ragged_batch, semi_supervised, small_data

from mmer_fast.data import DataError
from mmer_fast.models.pooling import padded_means
from mmer_fast.systems.adaptation import (
    SemiSupervised,
    SemiSupervisedConfig,
    hide_labels,
    maximum_mean_discrepancy,
    moment_discrepancy,
)

DISTANCES = {"mmd": maximum_mean_discrepancy, "moments": moment_discrepancy}


@pytest.mark.parametrize("matching", ["mmd", "moments"])
@pytest.mark.parametrize("matched", ["all", "unlabelled"])
def test_losses_are_those_of_the_parts(matching: str, matched: str) -> None:
    model, batch = semi_supervised(matching=matching, matched=matched, matching_weight=0.3), ragged_batch()
    labelled = batch.extras["labelled"]
    logits = model.logits(batch).tolist()
    terms = []
    for b in range(8):
        if labelled[b]:
            score = logits[b][int(batch.labels[b].argmax())]
            terms.append(math.log(sum(math.exp(s) for s in logits[b])) - score)
    counted = [b for b in range(8) if matched == "all" or not labelled[b]]
    latents, errors = {}, []
    for i, (name, encoder) in enumerate(model.encoders.items()):
        of_name = []
        for b in counted:
            length = int(batch.lengths[name][b])
            if length:
                x_tf = batch.features[name][b, :length]
                z = torch.tanh(model.projections[name](encoder(x_tf[None], torch.tensor([length]))[0]))
                torch.testing.assert_close(z, model.latents(batch)[b, i])
                of_name.append((z, (model.decoders[name](z) - x_tf.mean(dim=0)).square().mean()))
        latents[name] = torch.stack([z for z, _ in of_name])
        errors.append(sum(error for _, error in of_name) / len(of_name))
    expected = torch.stack(
        [
            torch.tensor(sum(terms) / len(terms), dtype=torch.float64),
            DISTANCES[matching](latents["text"], latents["audio"]),
            sum(errors) / 2,
        ]
    )
    objective = model.objective(batch)
    torch.testing.assert_close(objective.parts, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(objective.total, expected @ torch.tensor([1.0, 0.3, 0.1]).double())


def test_hidden_labels_are_not_read() -> None:
    model, batch = semi_supervised(), ragged_batch()
    before = model.objective(batch).total
    hidden = ~batch.extras["labelled"]
    batch.labels[hidden] = batch.labels[hidden].roll(1, dims=1)
    assert model.objective(batch).total == before
    batch.labels[~hidden] = batch.labels[~hidden].roll(1, dims=1)
    assert model.objective(batch).total != before


def test_a_batch_without_labels_and_one_of_one_sample() -> None:
    model, batch = semi_supervised(), ragged_batch()
    batch.extras["labelled"][:] = False
    objective = model.objective(batch)
    objective.total.backward()
    assert objective.parts[0] == 0
    assert (model.classifier.weight.grad == 0).all()
    assert max(p.grad.abs().max() for p in model.encoders.parameters()) > 0
    assert model.objective(batch.split([1, 7])[0]).total.isfinite()


def test_padding_and_missing_modalities_are_not_read() -> None:
    model, batch = semi_supervised(), ragged_batch()
    clean = model.objective(batch).total
    for name, x_btf in batch.features.items():
        padding = torch.arange(x_btf.shape[1]) >= batch.lengths[name][:, None]
        batch.features[name] = x_btf.masked_fill(padding[..., None], math.nan)
    objective = model.objective(batch)
    objective.total.backward()
    torch.testing.assert_close(objective.total, clean, rtol=0, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_latent_of_a_missing_modality_is_zero() -> None:
    model, batch = semi_supervised(), ragged_batch()
    latents = model.latents(batch).any(dim=2)
    assert torch.equal(latents, torch.stack([batch.lengths[name] > 0 for name in ("text", "audio")], dim=1))


def test_standardised_features_are_what_is_read_and_reconstructed() -> None:
    model, twin, train = semi_supervised(), semi_supervised(standardize=False), small_data().splits["train"]
    model.fit(train)
    batch, standard = ragged_batch(), ragged_batch()
    for name, x_ntf in train.features.items():
        units = torch.from_numpy(x_ntf[np.arange(x_ntf.shape[1]) < train.lengths[name][:, None]]).double()
        standard.features[name] = (batch.features[name] - units.mean(dim=0)) / units.std(dim=0, correction=0)
    expected = twin.objective(standard).parts
    torch.testing.assert_close(model.objective(batch).parts, expected, rtol=1e-5, atol=1e-6)


def test_average_unit_is_the_mean_of_what_is_there() -> None:
    x_btf = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [math.nan, 0.0]], [[math.nan] * 2] * 3])
    assert padded_means(x_btf, torch.tensor([2, 0])).tolist() == [[2, 3], [0, 0]]


def trained(**changes: Any) -> tuple[float, float]:
    """Accuracy on the test split, and the distance between the modalities' latents there."""
    data = hide_labels(small_data(n=120, shift=0.0), 0.2)
    model = semi_supervised(**changes)
    model.fit(data.splits["train"])
    train, test = (batch_of(data.splits[name], list(range(120))) for name in ("train", "test"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model.objective(train).total.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model.logits(test).argmax(1) == test.labels.argmax(1)
        text, audio = model.latents(test).unbind(dim=1)
    return right.double().mean().item(), maximum_mean_discrepancy(text, audio).item()


def test_it_learns_from_a_fifth_of_the_labels_and_matches_modalities() -> None:
    accuracy, distance = trained(matching_weight=1.0)
    _, unmatched = trained(matching_weight=0.0)
    assert accuracy > 0.6
    assert distance < 0.5 * unmatched


@pytest.mark.parametrize(("share", "count"), [(0.25, 6), (0.001, 1), (1.0, 24)])
def test_hide_labels_leaves_a_share_of_the_training_samples(share: float, count: int) -> None:
    data = hide_labels(small_data(), share, seed=3)
    assert data.check().splits["train"].extras["labelled"].sum() == count
    assert data.splits["test"].extras["labelled"].all()
    again, other = hide_labels(small_data(), share, seed=3), hide_labels(small_data(), share, seed=4)
    chosen = [x.splits["train"].extras["labelled"] for x in (data, again, other)]
    assert (chosen[0] == chosen[1]).all()
    assert (chosen[0] == chosen[2]).all() == (share == 1.0)
    SemiSupervised.check_data(data, SemiSupervisedConfig())


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_no_such_share(share: float) -> None:
    with pytest.raises(DataError, match=rf"share: expected a value in \(0, 1\]; got {share}"):
        hide_labels(small_data(), share)


def test_data_without_the_extra_is_refused() -> None:
    data = small_data()
    extras = data.splits["train"].extras
    for wrong in (np.zeros(24, dtype=np.bool_), np.ones(24), np.ones((24, 1), dtype=np.bool_)):
        extras["labelled"] = wrong
        with pytest.raises(DataError, match="extras labelled: expected"):
            SemiSupervised.check_data(data, SemiSupervisedConfig())
    del extras["labelled"]
    with pytest.raises(DataError, match=r"the extra labelled \(train_extras_labelled\), a bool a sample; hide_labels"):
        SemiSupervised.check_data(data, SemiSupervisedConfig())


def test_samples_without_labels_need_no_class() -> None:
    data = hide_labels(small_data(), 0.5)
    hidden = np.flatnonzero(~data.splits["train"].extras["labelled"])
    data.splits["train"].labels[hidden] = 0
    SemiSupervised.check_data(data, SemiSupervisedConfig())
    last = int(np.flatnonzero(data.splits["train"].extras["labelled"])[-1])
    data.splits["train"].labels[last] = 0
    with pytest.raises(DataError, match=f"train labels: expected exactly one .* for sample {last} "):
        SemiSupervised.check_data(data, SemiSupervisedConfig())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"matching": "ot"}, "matching must be"),
        ({"matching_weight": -1.0}, "matching_weight must be at least 0"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"SemiSupervisedConfig.{complaint}"):
        SemiSupervisedConfig(**changes)


def test_logits_have_a_column_a_class() -> None:
    assert semi_supervised().logits(ragged_batch()).shape == (8, CLASSES)

"""M3ER as a whole: fitting, check and proxies in evaluation, its objective, its ablations, and that it learns."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.data import Batch, MultiModalData, SequenceDataset, Split, make_correlated
from mmer_fast.metrics import multilabel_metrics
from mmer_fast.systems.m3er import M3ER, M3ERConfig, multiplicative_loss

SMALL = {"hidden": 6, "memory": 10, "head": 8, "components": 16, "cca_ridge": 0.5, "neighbours": 40, "proxy_ridge": 0.1}


def small_data(**sizes: float) -> MultiModalData:
    return make_correlated(**{"n_train": 300, "n_valid": 10, "n_test": 40, "max_length": 8, **sizes})


def fitted(data: MultiModalData, **changes) -> M3ER:
    torch.manual_seed(0)
    model = M3ER(data.modalities, len(data.label_names), M3ERConfig(**{**SMALL, **changes}))
    model.fit(data.splits["train"])
    return model.eval()


def whole(split: Split) -> Batch:
    return SequenceDataset(split).__getitems__(range(len(split)))


def with_config(model: M3ER, **changes) -> M3ER:
    model.config = dataclasses.replace(model.config, **changes)
    return model


def regenerated(model: M3ER, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    features = {name: model.standardization[name](x) for name, x in batch.features.items()}
    return model.regenerate(features, batch.lengths)


def test_feature_vectors_are_means_of_standardised_steps() -> None:
    data = small_data()
    model, train = fitted(data), data.splits["train"]
    used = np.arange(8) < train.lengths["audio"][:, None]
    units = train.features["audio"][used].astype(np.float64)
    standard = (train.features["audio"] - units.mean(axis=0)) / units.std(axis=0)
    expected = np.stack([x[:length].mean(axis=0) for x, length in zip(standard, train.lengths["audio"], strict=True)])
    kept = model.proxies.training_vectors[list(data.modalities).index("audio")]
    np.testing.assert_allclose(kept.vectors.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_missing_modality_becomes_a_proxy_as_long_as_the_longest_other() -> None:
    data = small_data(noisy_share=0, missing_share=1)
    model, test = fitted(data), data.splits["test"]
    batch = whole(test)
    features, lengths = regenerated(model, batch)
    for m, name in enumerate(data.modalities):
        missing = torch.from_numpy(test.extras["ineffectual"] == m)
        longest = torch.stack(list(batch.lengths.values())).amax(dim=0)
        assert torch.equal(lengths[name][missing], longest[missing])
        steps = features[name][missing]
        torch.testing.assert_close(steps, steps[:, :1].expand_as(steps))
    assert model(batch.features, batch.lengths).used.all()


def test_the_proxy_of_a_noisy_modality_is_as_long_as_what_it_replaces() -> None:
    data = small_data(noisy_share=1, missing_share=0)
    model, test = fitted(data), data.splits["test"]
    batch, text = whole(test), torch.from_numpy(test.extras["ineffectual"] == 0)
    batch.lengths["text"][text] = 2
    features = {name: model.standardization[name](x) for name, x in batch.features.items()}
    replaced = model.judge(features, batch.lengths)[2][:, 0] & text
    assert replaced.any()
    assert set(regenerated(model, batch)[1]["text"][replaced].tolist()) == {2}
    assert batch.lengths["video"].min() > 2


def test_proxies_are_closer_to_the_originals_than_the_noise_and_than_nothing() -> None:
    clean = whole(small_data(noisy_share=0, missing_share=0).splits["test"])
    data = small_data(noisy_share=1, missing_share=0)
    model, test = fitted(data), data.splits["test"]
    noisy = whole(test)
    before = {name: model.standardization[name](x) for name, x in noisy.features.items()}
    original = {name: model.standardization[name](x) for name, x in clean.features.items()}
    batches = [(original, clean.lengths), (before, noisy.lengths), model.regenerate(before, noisy.lengths)]
    vectors = [model.vectors(*batch) for batch in batches]
    found = ~model.check(vectors[1], torch.ones(40, 3, dtype=torch.bool))
    for m, name in enumerate(data.modalities):
        chosen = torch.from_numpy(test.extras["ineffectual"] == m)
        assert found[chosen, m].double().mean() > 0.8
        truth, noise, proxy = (v[name][chosen & found[:, m]] for v in vectors)
        assert (proxy - truth).norm(dim=1).mean() < 0.6 * truth.norm(dim=1).mean()
        assert (noise - truth).norm(dim=1).mean() > 2 * truth.norm(dim=1).mean()


def test_effective_modalities_are_read_as_they_are() -> None:
    data = small_data(noisy_share=0.5, missing_share=0.25)
    model, batch = fitted(data), whole(data.splits["test"])
    features, lengths = regenerated(model, batch)
    vectors = model.vectors({n: model.standardization[n](x) for n, x in batch.features.items()}, batch.lengths)
    present = torch.stack([batch.lengths[name] > 0 for name in data.modalities], dim=1)
    effective = model.check(vectors, present)
    assert 0.5 < effective.double().mean() < 1
    for m, name in enumerate(data.modalities):
        same = effective[:, m]
        expected = model.standardization[name](batch.features[name])
        assert torch.equal(features[name][same], expected[same])
        assert torch.equal(lengths[name][same], batch.lengths[name][same])


def test_gradients_reach_the_features_that_are_read_and_no_noise() -> None:
    data = small_data(noisy_share=1, missing_share=0)
    model, batch = fitted(data), whole(data.splits["test"])
    features = {name: x.requires_grad_() for name, x in batch.features.items()}
    model(features, batch.lengths).logits.square().sum().backward()
    standardized = {name: model.standardization[name](x) for name, x in features.items()}
    effective = model.judge(standardized, batch.lengths)[0]
    for m, x in enumerate(features.values()):
        assert torch.equal(x.grad.flatten(1).any(dim=1), effective[:, m])
    assert not effective.all()


def test_switches() -> None:
    """Without the check noise is read as it is; without proxies what is ineffectual is left out."""
    data = small_data(noisy_share=0.6, missing_share=0.4)
    model, test = fitted(data), data.splits["test"]
    batch = whole(test)
    chosen = {name: torch.from_numpy(test.extras["ineffectual"] == m) for m, name in enumerate(data.modalities)}
    noisy, missing = (torch.from_numpy(test.extras["shift"] == code) for code in (1, 2))
    logits = {}
    for check, proxy in ((True, True), (True, False), (False, True), (False, False)):
        features, lengths = regenerated(with_config(model, check=check, proxy=proxy), batch)
        logits[check, proxy] = model.logits(batch)
        for name in data.modalities:
            length = lengths[name]
            assert bool((length[chosen[name] & missing] > 0).all()) is proxy
            if not check:
                own = chosen[name] & noisy
                assert torch.equal(features[name][own], model.standardization[name](batch.features[name])[own])
            elif not proxy:
                assert (length[chosen[name] & noisy] == 0).double().mean() > 0.7
    values = list(logits.values())
    assert all(not torch.equal(values[i], values[j]) for i in range(4) for j in range(i))


def test_training_reads_the_data_as_they_are_unless_told_otherwise() -> None:
    data = small_data()
    model, batch = fitted(data), whole(data.splits["test"])
    in_evaluation = model.logits(batch)
    model.train()
    as_they_are = model.logits(batch)
    assert not torch.equal(as_they_are, in_evaluation)
    torch.testing.assert_close(with_config(model, in_training=True).logits(batch), in_evaluation)
    model.eval()
    torch.testing.assert_close(with_config(model, check=False, proxy=False).logits(batch), as_they_are)


@pytest.mark.parametrize("changes", [{}, {"fusion": "original", "beta": 2.0, "fusion_weight": 0.5}])
def test_the_objective_is_cross_entropy_and_multiplicative_loss(changes: dict) -> None:
    data = small_data(missing_share=0.5)
    model, batch = fitted(data, **changes).train(), whole(data.splits["test"])
    out, objective, config = model(batch.features, batch.lengths), model.objective(batch), model.config
    recognition = F.binary_cross_entropy_with_logits(out.logits, batch.labels)
    fusion = multiplicative_loss(
        out.modality_logits, batch.labels, out.used, beta=config.beta, form=config.fusion, weight=config.modified_weight
    ).mean()
    assert not out.used.all()
    torch.testing.assert_close(objective.parts, torch.stack([recognition, fusion]))
    torch.testing.assert_close(objective.total, recognition + config.fusion_weight * fusion)
    torch.testing.assert_close(objective.logits, out.logits)
    objective.total.backward()
    assert not objective.parts.requires_grad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_padding_and_other_samples_have_no_influence() -> None:
    data = small_data()
    model, batch = fitted(data), whole(data.splits["test"])
    expected = model.logits(batch)
    padded = {name: F.pad(x, (0, 0, 0, 3)) for name, x in batch.features.items()}
    for name, x in padded.items():
        x[torch.arange(x.shape[1]) >= batch.lengths[name][:, None]] = torch.nan
    torch.testing.assert_close(model(padded, batch.lengths).logits, expected)
    for part, logits in zip(batch.split([1, 9, 30]), expected.split([1, 9, 30]), strict=True):
        torch.testing.assert_close(model.logits(part), logits, rtol=1e-4, atol=1e-5)


def test_a_sample_without_any_modality() -> None:
    data = small_data()
    model, batch = fitted(data), whole(data.splits["valid"])
    nothing = {name: torch.zeros_like(length) for name, length in batch.lengths.items()}
    out = model(batch.features, nothing)
    assert not out.used.any()
    torch.testing.assert_close(out.logits, out.logits[:1].expand_as(out.logits))
    objective = model.train().objective(dataclasses.replace(batch, lengths=nothing))
    assert objective.total.isfinite()
    assert objective.parts[1] == 0


def test_a_checkpoint_has_all_that_was_fitted() -> None:
    data = small_data()
    model, batch = fitted(data), whole(data.splits["test"])
    fresh = M3ER(data.modalities, 6, model.config).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.logits(batch), model.logits(batch), rtol=0, atol=0)


def test_fitting_draws_no_random_numbers() -> None:
    data = small_data()
    model, state = fitted(data), torch.get_rng_state()
    model.fit(data.splits["train"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 0}, "M3ERConfig.hidden must be at least 1, got 0"),
        ({"dropout": 1.0}, r"M3ERConfig.dropout must be in \[0, 1\), got 1.0"),
        ({"components": 1}, "M3ERConfig.components must be at least 2"),
        ({"tau": 1.5}, r"M3ERConfig.tau must be in \[-1, 1\] or None, got 1.5"),
        ({"false_alarms": 0.0}, r"M3ERConfig.false_alarms must be in \(0, 1\), got 0.0"),
        ({"neighbours": 0}, "M3ERConfig.neighbours must be at least 1 or None, got 0"),
        ({"beta": -1.0}, "M3ERConfig.beta must be finite and at least 0, got -1.0"),
        ({"rule": "most"}, "M3ERConfig.rule must be"),
    ],
)
def test_a_bad_configuration_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M3ERConfig(**changes)


@pytest.fixture(scope="module")
def trained() -> tuple[M3ER, MultiModalData]:
    torch.manual_seed(0)
    data = make_correlated(n_train=800, n_valid=1, n_test=800, max_length=6, noisy_share=0.5, missing_share=0.25)
    config = M3ERConfig(**{**SMALL, "hidden": 16, "memory": 16, "head": 32, "detach_weights": True})
    model = M3ER(data.modalities, 6, config)
    model.fit(data.splits["train"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = whole(data.splits["train"])
    for _ in range(12):
        for part in batch.split([100] * 8):
            optimizer.zero_grad()
            model.objective(part).total.backward()
            optimizer.step()
    return model.eval(), data


@torch.no_grad()
def micro_f1(model: M3ER, split: Split, shift: int, **changes) -> float:
    config = model.config
    probabilities = with_config(model, **changes).logits(whole(split)).sigmoid()
    model.config = config
    chosen = split.extras["shift"] == shift
    return multilabel_metrics(probabilities[chosen], split.labels[chosen])["micro_f1"]


def test_it_learns(trained: tuple[M3ER, MultiModalData]) -> None:
    """The best constant answer is "happy", the one label that more than half of the samples have."""
    model, data = trained
    test = data.splits["test"]
    labels = test.labels[test.extras["shift"] == 0]
    constant = np.zeros(labels.shape, np.float32)
    constant[:, 0] = 1
    assert micro_f1(model, test, 0) > multilabel_metrics(constant, labels)["micro_f1"] + 0.1


@pytest.mark.parametrize("shift", [1, 2])
def test_check_and_proxies_help_where_a_modality_is_noise_or_missing(
    trained: tuple[M3ER, MultiModalData], shift: int
) -> None:
    model, data = trained
    test = data.splits["test"]
    assert micro_f1(model, test, shift) > micro_f1(model, test, shift, check=False, proxy=False) + 0.02

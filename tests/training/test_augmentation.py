"""Random erasing and Gaussian noise on training batches."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import MODEL, TRAIN, Silent, StopAt, run_config, small_data, small_model, train
from torch import Tensor

from mmer_fast.data import Batch
from mmer_fast.training import configs_from_json, configs_to_json
from mmer_fast.training.augmentation import augmented
from mmer_fast.training.files import STATE_FILE
from mmer_fast.training.trainer import Trainer

NAMES = ("random_erasing", "gaussian_noise")
every_augmentation = pytest.mark.parametrize("name", NAMES)


def make_batch(lengths: list[int], size: int = 20, value: float | None = None) -> Batch:
    """One modality, features of mean 3 and standard deviation 2, or one value; zeros in the padding."""
    torch.manual_seed(0)
    lengths_b = torch.tensor(lengths)
    x = 3 + 2 * torch.randn(len(lengths), max(lengths) + 2, size) if value is None else None
    x = torch.full((len(lengths), max(lengths) + 2, size), value) if x is None else x
    x = x * (torch.arange(x.shape[1]) < lengths_b[:, None])[..., None]
    return Batch({"a": x}, {"a": lengths_b}, torch.zeros(len(lengths), 2), torch.arange(len(lengths)))


def apply(batch: Batch, name: str, seed: int = 1, **changes: Any) -> Tensor:
    torch.manual_seed(seed)
    return augmented(batch, dataclasses.replace(TRAIN, augmentation=name, **changes)).features["a"]


@every_augmentation
def test_padding_and_the_given_batch_stay_and_the_rest_comes_from_the_generator(name: str) -> None:
    batch = make_batch([6, 0, 3, 8] * 10)
    before = batch.features["a"].clone()
    got = apply(batch, name)
    assert torch.equal(batch.features["a"], before)
    valid = torch.arange(10) < batch.lengths["a"][:, None]
    assert (got[~valid] == 0).all()
    assert not torch.equal(got, before)
    assert got.isfinite().all()
    assert torch.equal(got, apply(batch, name))
    assert not torch.equal(got, apply(batch, name, seed=2))


def test_without_augmentation_nothing_is_done_or_drawn() -> None:
    batch, state = make_batch([4]), torch.get_rng_state()
    assert augmented(batch, TRAIN) is batch
    assert torch.equal(torch.get_rng_state(), state)


@every_augmentation
def test_the_amount_of_padding_does_not_change_the_scale(name: str) -> None:
    scales = []
    for padding in (0, 400):
        batch = make_batch([50] * 40)
        batch.features["a"] = torch.nn.functional.pad(batch.features["a"], (0, 0, 0, padding))
        added = apply(batch, name, erasing_probability=1.0) - batch.features["a"]
        scales.append(added[added != 0].std())
    torch.testing.assert_close(*scales, rtol=0.05, atol=0)


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_noise_has_the_scale_of_each_feature(scale: float) -> None:
    batch = make_batch([30, 50, 20] * 20, size=3)
    units = torch.tensor([1.0, 100.0, 0.01])
    batch.features["a"] *= units
    added = apply(batch, "gaussian_noise", noise_scale=scale) - batch.features["a"]
    valid = torch.arange(52) < batch.lengths["a"][:, None]
    torch.testing.assert_close(added[valid].std(0), 2 * scale * units, rtol=0.06, atol=0)
    assert (added[valid].mean(0).abs() < 0.2 * scale * units).all()


def rectangles(batch: Batch, **changes: Any) -> list[tuple[int, int, int, int] | None]:
    """First and last erased unit, first and last erased feature of each sample; all between must be erased."""
    changed = apply(batch, "random_erasing", **changes) != batch.features["a"]
    found: list[tuple[int, int, int, int] | None] = []
    for sample in changed:
        times, features = sample.any(1).nonzero()[:, 0], sample.any(0).nonzero()[:, 0]
        if len(times) == 0:
            found.append(None)
            continue
        (t0, t1), (f0, f1) = (x[[0, -1]].tolist() for x in (times, features))
        assert sample[t0 : t1 + 1, f0 : f1 + 1].all()
        assert sample.sum() == (t1 - t0 + 1) * (f1 - f0 + 1)
        found.append((t0, t1, f0, f1))
    return found


def test_erased_is_a_rectangle_of_the_published_areas_and_aspects_anywhere_in_the_valid_part() -> None:
    n, size = 100, 200
    found = [r for r in rectangles(make_batch([n] * 300, size), erasing_probability=1.0) if r is not None]
    assert len(found) == 300
    height = torch.tensor([(t1 - t0 + 1) / n for t0, t1, _, _ in found])
    width = torch.tensor([(f1 - f0 + 1) / size for _, _, f0, f1 in found])
    area, aspect = height * width, height / width
    assert 0.015 < area.min() < 0.04
    assert 0.36 < area.max() < 0.42
    assert area.mean().item() == pytest.approx(0.21, abs=0.02)
    assert 0.27 < aspect.min() < 0.4
    assert 2.5 < aspect.max() < 3.6
    assert abs(aspect.log().mean()) < 0.15
    assert min(t0 for t0, _, _, _ in found) == min(f0 for _, _, f0, _ in found) == 0
    assert max(t1 for _, t1, _, _ in found) == n - 1
    assert max(f1 for _, _, _, f1 in found) == size - 1


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_as_many_samples_as_configured_are_erased(probability: float) -> None:
    found = rectangles(make_batch([8] * 500), erasing_probability=probability)
    assert sum(r is not None for r in found) / 500 == pytest.approx(probability, abs=0.06)


@pytest.mark.parametrize("length", [1, 2])
def test_short_samples_lose_at_least_one_feature_and_missing_ones_nothing(length: int) -> None:
    found = rectangles(make_batch([length, 0] * 50, size=3), erasing_probability=1.0)
    assert all(r is not None and r[1] < length for r in found[::2])
    assert found[1::2] == [None] * 50


def test_erased_values_have_the_scale_of_their_feature() -> None:
    batch = make_batch([50] * 100, size=3)
    batch.features["a"][..., 1] *= 100
    got = apply(batch, "random_erasing", erasing_probability=1.0)
    for feature, unit in enumerate((1.0, 100.0, 1.0)):
        values = got[..., feature][got[..., feature] != batch.features["a"][..., feature]]
        assert values.mean().item() == pytest.approx(3 * unit, rel=0.1)
        assert values.std().item() == pytest.approx(2 * unit, rel=0.1)
    constant = make_batch([5] * 4, value=7.0)
    torch.testing.assert_close(apply(constant, "random_erasing", erasing_probability=1.0), constant.features["a"])


@every_augmentation
def test_all_passes_of_a_step_see_the_same_batch_and_validation_the_data(tmp_path: Path, name: str) -> None:
    data = small_data()
    config = run_config(data, augmentation=name, epochs=1, erasing_probability=1.0).train
    model = small_model(data, dataclasses.replace(MODEL, reversal="none", mask_ratio=0.0))  # masks of 1
    trainer = Trainer(model, config, data, tmp_path, {}, Silent())
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    model.embeddings["audio"].register_forward_pre_hook(lambda m, inputs: seen[m.training].append(inputs[0].clone()))
    trainer.fit()
    assert len(seen[True]) == 12  # clean, masked and perturbed of four batches; dropout is on, so nothing is shared
    stored = {tuple(row.tolist()) for x in data.splits["train"].features["audio"] for row in torch.from_numpy(x)}
    for clean, masked, noisy in zip(seen[True][::3], seen[True][1::3], seen[True][2::3], strict=True):
        torch.testing.assert_close(masked, clean)
        assert torch.equal(noisy, clean)
        assert not all(tuple(row.tolist()) in stored for row in clean)
    valid = {tuple(row.tolist()) for x in data.splits["valid"].features["audio"] for row in torch.from_numpy(x)}
    assert seen[False]
    assert all(tuple(row.tolist()) in valid for x in seen[False] for row in x)


@every_augmentation
def test_every_augmentation_trains_and_resumes_to_the_same_bits(tmp_path: Path, name: str) -> None:
    changes: dict[str, Any] = {"augmentation": name, "rho": 0.0, "sigma": 0.0}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = train(whole, Silent(), **changes)
    assert all(math.isfinite(record["train"]["recognition"]) for record in expected["history"])
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(3), **changes)
    assert train(stopped, Silent(), **changes) == expected
    for file in ("metrics.json", "model.safetensors", STATE_FILE):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), file
    plain = tmp_path / "plain"
    train(plain, Silent(), rho=0.0, sigma=0.0)
    assert (plain / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


FIELDS = {"augmentation": "random_erasing", "erasing_probability": 0.25, "noise_scale": 0.2}


def test_the_fields_survive_json_and_may_be_absent() -> None:
    values = json.loads(json.dumps(configs_to_json(MODEL, dataclasses.replace(TRAIN, **FIELDS))))
    assert {name: values["train"][name] for name in FIELDS} == FIELDS
    assert configs_from_json(values) == (MODEL, dataclasses.replace(TRAIN, **FIELDS))
    for name in FIELDS:
        del values["train"][name]
    assert configs_from_json(values) == (MODEL, TRAIN)


@pytest.mark.parametrize(
    ("field", "value"),
    [("augmentation", "mixup"), ("erasing_probability", 1.5), ("erasing_probability", -0.1), ("noise_scale", -1.0)],
)
def test_bad_values_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field} must be .*got"):
        dataclasses.replace(TRAIN, **{field: value})

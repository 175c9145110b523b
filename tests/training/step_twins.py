"""The fast step beside the textbook's: small models, a batch, and their comparison, for several files of tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from small_training import MODEL, small_data, small_model
from torch import Tensor

from mmer_fast.data import Batch, SequenceDataset
from mmer_fast.models import RobMMR
from mmer_fast.training import Algorithm1, StepResult, TrainConfig, preset
from mmer_fast.training.fast_step import FastStep

SIZES = {"dim": 16, "ffn_dim": 24, "heads": 2, "unimodal_blocks": 2, "multimodal_blocks": 1}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.2}


def make_batch(samples: int = 6, dtype: torch.dtype = torch.float64) -> Batch:
    """One sample lacks its audio."""
    batch = SequenceDataset(small_data().splits["train"]).__getitems__(range(samples))
    batch.features = {name: x.to(dtype) for name, x in batch.features.items()}
    batch.labels = batch.labels.to(dtype)
    batch.lengths["audio"][2] = 0
    return batch


def shrunk(name: str) -> tuple[dict[str, Any], TrainConfig]:
    """Changes of a small model and the training configuration of a preset."""
    model, train = preset(name)
    values = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)} | SIZES
    return values, dataclasses.replace(train, gamma=0.5)


def make_model(dtype: torch.dtype = torch.float64, **changes: Any) -> RobMMR:
    """A small model without dropout, unless `changes` of its configuration say otherwise."""
    config = dataclasses.replace(MODEL, **{**SIZES, **NO_DROPOUT, **changes})
    return small_model(small_data(), config).to(dtype)


def run(
    step: Algorithm1, batch: Batch, *, measure: bool = False, seed: int = 3
) -> tuple[StepResult, dict[str, Tensor | None]]:
    """The result of a step from a seed, and the gradients of the parameters by name."""
    step.model.zero_grad()
    torch.manual_seed(seed)
    result = step.accumulate_gradients(batch, measure_ratio=measure)
    return result, {name: p.grad for name, p in step.model.named_parameters()}


def assert_same(
    got: tuple[StepResult, dict[str, Tensor | None]], expected: tuple[StepResult, dict[str, Tensor | None]]
) -> None:
    """Results and gradients of `run` are equal up to rounding in float64."""
    torch.testing.assert_close(got[0].losses, expected[0].losses, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(got[0].logits, expected[0].logits, rtol=1e-9, atol=1e-12)
    assert (got[0].gradient_ratio is None) == (expected[0].gradient_ratio is None)
    if got[0].gradient_ratio is not None:
        torch.testing.assert_close(got[0].gradient_ratio, expected[0].gradient_ratio, rtol=1e-9, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values() if gradient is not None)
    for name, gradient in expected[1].items():
        if gradient is None:
            assert got[1][name] is None, name
            continue
        # An entry that is nearly 0 is a difference of larger ones of its parameter. Biases of keys, which have no
        # influence, are one of larger ones below.
        atol = 1e-9 * float(gradient.abs().max()) + 1e-15 * largest
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-9, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def compare(model: RobMMR, config: TrainConfig, batch: Batch, *, measure: bool = False) -> None:
    """The fast step gives what the textbook step gives, and neither moves a weight."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = run(Algorithm1(model, config), batch, measure=measure)
    got = run(FastStep(model, config), batch, measure=measure)
    assert_same(got, expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

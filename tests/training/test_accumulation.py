"""Gradient accumulation: the gradients, losses and records of the whole batch from micro-batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import MODEL, TRAIN, Silent, StopAt, small_data, small_model, train
from torch import Tensor

from mmer_fast.data import Batch, SequenceDataset
from mmer_fast.models import RobMMR
from mmer_fast.training import Algorithm1, FastStep, StepResult, TrainConfig
from mmer_fast.training.accumulation import accumulate_gradients
from mmer_fast.training.trainer import Trainer

STEPS = {"fast": FastStep, "textbook": Algorithm1}


def batch_of(samples: int) -> Batch:
    batch = SequenceDataset(small_data().splits["train"]).__getitems__(range(samples))
    batch.features = {name: x.double() for name, x in batch.features.items()}
    batch.labels = batch.labels.double()
    return batch


def plain_model() -> RobMMR:
    """Without dropout, whose draws differ between a batch and its parts."""
    config = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0)
    return small_model(small_data(), config).double()


def step(
    batch: Batch, micro_batch: int, form: str = "fast", measure: bool = False, **changes: Any
) -> tuple[StepResult, dict[str, Tensor]]:
    """The result and the gradients by name."""
    model = plain_model()
    algorithm = STEPS[form](model, dataclasses.replace(TRAIN, step=form, **changes))
    result = accumulate_gradients(algorithm, batch, batch.index.split(micro_batch), measure_ratio=measure)
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_without_app_the_gradients_are_those_of_the_whole_batch(form: str, loss: str) -> None:
    batch = batch_of(7)
    whole, expected = step(batch, 7, form, sigma=0.0, rho=0.5, recognition_loss=loss)
    result, gradients = step(batch, 3, form, sigma=0.0, rho=0.5, recognition_loss=loss)  # of 3, 3 and 1 samples
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(result.losses, whole.losses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.logits, whole.logits, rtol=1e-9, atol=1e-12)
    assert result.gradient_ratio is None


@pytest.mark.parametrize("form", STEPS)
def test_app_perturbs_each_micro_batch_along_its_own_gradient(form: str) -> None:
    batch = batch_of(5)
    result, gradients = step(batch, 3, form, measure=True, gamma=0.5)
    (first, of_first), (second, of_second) = (
        step(part, 3, form, measure=True, gamma=0.5) for part in batch.split([3, 2])
    )
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, 0.6 * of_first[name] + 0.4 * of_second[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.losses, 0.6 * first.losses + 0.4 * second.losses)
    torch.testing.assert_close(result.gradient_ratio, 0.6 * first.gradient_ratio + 0.4 * second.gradient_ratio)
    assert result.losses[2] > 0
    assert not torch.allclose(result.losses[2], step(batch, 5, form, gamma=0.5)[0].losses[2], rtol=1e-3)


def test_a_batch_that_fits_is_one_step_of_the_same_bits() -> None:
    batch, model = batch_of(6), plain_model()
    Algorithm1(model, TRAIN).accumulate_gradients(batch)
    _, gradients = step(batch, 8, "textbook")
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None)


def test_a_batch_is_cut_in_order_into_views() -> None:
    batch = batch_of(7)
    parts = batch.split([3, 3, 1])
    assert [part.index.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    for name, values in batch.features.items():
        assert torch.equal(torch.cat([part.features[name] for part in parts]), values)
        assert parts[1].features[name].data_ptr() == values[3].data_ptr()
        assert torch.equal(torch.cat([part.lengths[name] for part in parts]), batch.lengths[name])
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)


class Sizes(FastStep):
    """Keeps the number of samples of each run of the step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[int] = []

    def accumulate_gradients(self, batch: Batch, *, measure_ratio: bool = False, weight: float = 1.0) -> StepResult:
        self.seen.append(len(batch))
        return super().accumulate_gradients(batch, measure_ratio=measure_ratio, weight=weight)


def test_the_trainer_cuts_the_batches_of_an_optimizer_step(tmp_path: Path) -> None:
    class Samples(Silent):
        seen: tuple[int, ...] = ()

        def on_step(self, epoch: int, step: int, samples: int, result: Any) -> None:
            super().on_step(epoch, step, samples, result)
            assert result.logits.shape[0] == samples
            self.seen += (samples,)

    data, observer = small_data(), Samples()
    config = TrainConfig(epochs=1, batch_size=8, accumulation=2, warmup=0)
    trainer = Trainer(small_model(data), config, data, tmp_path, {}, observer)
    trainer.algorithm = Sizes(trainer.model, config)
    trainer.fit()
    assert observer.seen == (8, 8, 8, 6)
    assert trainer.algorithm.seen == [4, 4, 4, 4, 4, 4, 4, 2]
    assert trainer.optimizer.state[next(trainer.model.parameters())]["step"] == 4


def test_training_without_app_and_dropout_is_that_of_whole_batches(tmp_path: Path) -> None:
    records = []
    for accumulation in (1, 4):
        observer, data = Silent(), small_data()
        config = dataclasses.replace(TRAIN, sigma=0.0, accumulation=accumulation)
        model = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0)
        Trainer(small_model(data, model), config, data, tmp_path, {}, observer).fit()
        records.append(observer.records[-1]["train"])
    assert records[1] == pytest.approx(records[0], rel=1e-3)
    assert records[1] != records[0]


def test_accumulation_resumes_to_the_same_result(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", Silent(), accumulation=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", StopAt(3), accumulation=2)
    assert train(tmp_path / "stopped", Silent(), accumulation=2) == whole

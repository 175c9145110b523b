"""NaN and infinity: training stops where they come up, says where they are, and keeps the last good state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import MODEL, TRAIN, Silent, small_data, small_model, train
from torch import Tensor, nn

from mmer_fast.training import failures
from mmer_fast.training import trainer as trainer_module
from mmer_fast.training.algorithm1 import LOSSES, RECOGNITION_LOSSES
from mmer_fast.training.checkpoint import read_tensors
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.files import FAILED_FILE, STATE_FILE
from mmer_fast.training.finite import first_loss, first_nonfinite, inputs, is_finite
from mmer_fast.training.loader import training_batches
from mmer_fast.training.order import epoch_batches
from mmer_fast.training.trainer import Trainer

NAN = float("nan")


def make_trainer(directory: Path, observer: Any = None, **changes: Any) -> Trainer:
    data = small_data()
    config = dataclasses.replace(TRAIN, **changes)
    return Trainer(small_model(data, MODEL), config, data, directory, {}, observer or Silent())


class Poison(Silent):
    """Changes the trainer after some steps; on_step of step `after` comes before its checkpoint."""

    def __init__(self, after: int, change: Any) -> None:
        super().__init__()
        self.after, self.change = after, change

    def on_step(self, *arguments: Any) -> None:
        super().on_step(*arguments)
        if self.steps == self.after:
            self.change()


def poison(parameter: nn.Parameter, value: float = NAN) -> None:
    parameter.data.view(-1)[0] = value


def stops(trainer: Trainer) -> str:
    """The one line with which training stops."""
    with pytest.raises(TrainingError) as error:
        trainer.fit()
    message = str(error.value)
    assert "\n" not in message
    assert str(trainer.files.directory / FAILED_FILE) in message
    return message


def good_progress(directory: Path) -> tuple[int, int]:
    """Epoch and step of the saved state, which has to be finite."""
    tensors, progress = read_tensors(directory / STATE_FILE)
    assert all(is_finite(tensor) for tensor in tensors.values())
    return progress["epoch"], progress["step"]


def test_a_loss_that_turns_nan_is_named_with_epoch_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def loss(logits_bk: Tensor, labels_bk: Tensor) -> Tensor:
        nonlocal calls
        calls += logits_bk.requires_grad  # not on the validation split
        value = nn.functional.binary_cross_entropy_with_logits(logits_bk, labels_bk)
        return value * NAN if calls == 12 else value  # L_m of step 6: L_r and L_m of each step are odd and even calls

    monkeypatch.setitem(RECOGNITION_LOSSES, "bce", loss)
    trainer = make_trainer(tmp_path)
    message = stops(trainer)
    assert message.startswith("the masked loss is not finite in epoch 2, step 2; ")
    assert "the gradient of " in message  # weights and features are finite
    assert good_progress(tmp_path) == (1, 1)


def test_a_parameter_that_is_nan_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, checkpoint_every=0)
    bad = trainer.model.decoder.queries
    trainer.observer = Poison(2, lambda: poison(bad))
    message = stops(trainer)
    assert message.startswith("the recognition loss is not finite in epoch 1, step 3; ")
    assert "first tensor that is not: the parameter decoder.queries;" in message
    assert not (tmp_path / STATE_FILE).exists()


def test_a_learning_rate_that_throws_the_weights_away_is_noticed_before_they_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1e-3, 1e-3, float("inf")])
    monkeypatch.setattr(trainer_module, "learning_rate", lambda *_: next(rates))
    message = stops(make_trainer(tmp_path))
    assert message.startswith("the weights after the optimizer step are not finite in epoch 1, step 3; ")
    assert "the parameter " in message
    assert good_progress(tmp_path) == (0, 2)


def test_a_gradient_that_is_not_finite_is_named_rather_than_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, clip_norm=None)
    optimize = trainer.optimizer.step

    def step() -> None:
        trainer.model.decoder.queries.grad.view(-1)[0] = NAN
        optimize()

    monkeypatch.setattr(trainer.optimizer, "step", step)
    message = stops(trainer)
    assert "optimizer step are not finite in epoch 1, step 1; " in message
    assert "the gradient of decoder.queries;" in message


def test_finite_weights_that_overflow_on_the_validation_split(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, batch_size=30, learning_rate=1e30, warmup=0, clip_norm=None, checkpoint_every=0)
    message = stops(trainer)  # after the only step of the epoch
    assert message.startswith("the model's logits are not finite on the validation split in epoch 1, step 1; ")
    assert not (tmp_path / "model.safetensors").exists()


def test_bad_features_are_named_with_their_samples(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    samples = epoch_batches(trainer.train_split, trainer.config, 0)[1].tolist()
    trainer.train_split.features["video"][samples[3], 0, 0] = NAN  # after the check of the data
    message = stops(trainer)
    assert "epoch 1, step 2; " in message
    assert f"the features of video, sample(s) {samples[3]};" in message


def test_the_state_at_the_failure_is_kept_with_the_samples(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.observer = Poison(2, lambda: poison(trainer.model.decoder.queries))
    stops(trainer)
    good, failed = read_tensors(tmp_path / STATE_FILE), read_tensors(tmp_path / FAILED_FILE)
    assert failed[0].keys() == good[0].keys()
    assert failed[0]["model/decoder.queries"].isnan().sum() == 1
    batch = failed[1].pop("batch")
    assert batch == epoch_batches(trainer.train_split, trainer.config, 0)[1].tolist()
    assert failed[1].keys() == good[1].keys()
    assert (good[1]["step"], failed[1]["step"]) == (1, 2)
    assert not list(tmp_path.glob(".partial*"))


def test_resuming_goes_on_from_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = trainer_module.accumulate_gradients
    calls = 0

    def broken(algorithm: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = step(algorithm, batch, *arguments, **options)
        return dataclasses.replace(result, losses=result.losses * NAN) if calls == 6 else result

    monkeypatch.setattr(trainer_module, "accumulate_gradients", broken)
    with pytest.raises(TrainingError, match=r"epoch 2, step 2; first tensor that is not: none;"):
        train(tmp_path / "broken", Silent())
    observer = Silent()
    assert train(tmp_path / "broken", observer) == train(tmp_path / "whole", Silent())
    assert observer.steps == 3


class Elsewhere:
    """A device whose losses are not to be read at every step."""

    type = "cuda"


@pytest.mark.parametrize(
    ("log_every", "stopped_after", "steps"), [(3, 3, "3 steps up to step 3"), (9, 4, "4 steps up to step 4")]
)
def test_where_the_losses_are_read_seldom_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int, stopped_after: int, steps: str
) -> None:
    observer = Silent()
    trainer = make_trainer(tmp_path, observer, log_every=log_every, checkpoint_every=0)
    monkeypatch.setattr(trainer_module, "training_batches", lambda *given: training_batches(*given[:2], cpu, 0))
    cpu, trainer.device = trainer.device, Elsewhere()  # type: ignore[assignment]
    reads = []
    monkeypatch.setattr(failures, "is_finite", lambda tensor: reads.append(1) or is_finite(tensor))
    trainer.observer = Poison(1, lambda: poison(trainer.model.decoder.queries))
    message = stops(trainer)
    assert f"the recognition loss is not finite in epoch 1, in one of the {steps}; " in message
    assert "the parameter " in message
    assert trainer.observer.steps == stopped_after
    assert len(reads) <= 3


def test_a_failure_that_cannot_be_kept_is_still_told(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, checkpoint_every=0)
    (tmp_path / FAILED_FILE).mkdir()
    poison(trainer.model.decoder.queries)
    message = stops(trainer)
    assert "the recognition loss is not finite in epoch 1, step 1; " in message
    assert "cannot write" in message


def test_the_first_loss_and_many_samples() -> None:
    losses = ([NAN, NAN, 0.0], [0.0, NAN, NAN], [0.0, 0.0, float("inf")])
    assert [first_loss(torch.tensor(x), LOSSES) for x in losses] == [
        "recognition",
        "masked",
        "perturbed",
    ]
    split = small_data().splits["train"]
    (batch,) = training_batches(split, [torch.arange(7)], torch.device("cpu"), 0)
    batch.features["audio"][:, 0] = float("inf")
    assert first_nonfinite(inputs(batch)) == "the features of audio, sample(s) 0, 1, 2, 3, 4, ..."

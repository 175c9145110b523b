"""The training loop: epochs of Algorithm 1, validation, selection of the best epoch, checkpoints.

Everything that a step depends on is in the checkpoint: weights, optimiser, random generators, the place in
the data order (a permutation seeded by seed and epoch) and the running sums of the epoch. So training that
was killed at any moment and resumed ends with the same bits as training that was not, on the same machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmer_fast.data import MultiModalData
from mmer_fast.models import RobMMR
from mmer_fast.training.algorithm1 import StepResult
from mmer_fast.training.augmentation import augmented
from mmer_fast.training.checkpoint import (
    CheckpointError,
    load_optimizer_tensors,
    optimizer_tensors,
    random_states,
    read_tensors,
    restore_random_states,
    section,
    with_prefix,
    write_tensors,
)
from mmer_fast.training.config import TrainConfig
from mmer_fast.training.evaluate import evaluate
from mmer_fast.training.fast_step import chosen_step
from mmer_fast.training.order import batches, epoch_batches
from mmer_fast.training.schedule import learning_rate

STATE_FILE = "state.safetensors"
BEST_FILE = "model.safetensors"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


class Observer(Protocol):
    """Who wants to know how training goes."""

    def on_step(self, epoch: int, step: int, samples: int, result: StepResult) -> None:
        """After step `step` of epoch `epoch` (both from 0), over `samples` samples."""

    def on_epoch(self, record: dict[str, Any]) -> None:
        """After each epoch, with its entry of the history."""


@dataclass
class Progress:
    """Where training is: epochs done, steps done in the epoch under way, and what was seen so far."""

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    gradient_ratios: list[float] = field(default_factory=list)
    best_epoch: int | None = None


class EpochSums:
    """Sums over the steps of an epoch, on the device: losses weighted by samples, and label counts.

    `losses` (3,) float64: L_r, L_m, L_p. `counts` (4,) int64: true positives, false positives, false
    negatives, samples.
    """

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.zeros(3, dtype=torch.float64, device=device)
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)

    def add(self, result: StepResult, labels_bk: Tensor, threshold: float) -> None:
        predicted_bk = result.logits.sigmoid() > threshold
        true_bk = labels_bk.bool()
        pairs = (predicted_bk & true_bk, predicted_bk & ~true_bk, ~predicted_bk & true_bk)
        samples = len(labels_bk)
        self.losses += result.losses.double() * samples
        self.counts += torch.stack([pair.sum() for pair in pairs] + [self.counts.new_tensor(samples)])

    def summary(self) -> dict[str, float]:
        """Mean losses, and the micro-F1 of the predictions made while training (dropout on, weights
        moving).
        """
        hit, false, missed, samples = self.counts.tolist()
        means = dict(zip(("recognition", "masked", "perturbed"), (self.losses / samples).tolist(), strict=True))
        return {**means, "micro_f1": 2 * hit / max(2 * hit + false + missed, 1)}


class Trainer:
    """Trains a model; keeps `state.safetensors` and `model.safetensors` (the best epoch) in a directory.

    Args:
        model: on its device, freshly initialised; `resume` replaces its weights.
        config: how to train.
        data: splits "train" and "valid" are used.
        directory: existing; where the two files go.
        header: JSON data stored with the best weights, enough to build the model again.
        observer: told about steps and epochs.
    """

    def __init__(
        self,
        model: RobMMR,
        config: TrainConfig,
        data: MultiModalData,
        directory: Path,
        header: dict[str, Any],
        observer: Observer,
    ) -> None:
        self.model = model
        self.config = config
        self.train_split, self.valid_split = data.splits["train"], data.splits["valid"]
        self.directory = directory
        self.header = header
        self.observer = observer
        self.device = next(model.parameters()).device
        self.algorithm = chosen_step(model, config)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
        )
        self.steps_per_epoch = -(-len(self.train_split) // config.batch_size)
        self.progress = Progress()
        self.sums = EpochSums(self.device)

    def fit(self) -> list[dict[str, Any]]:
        """Train from where `progress` stands to the last epoch; returns the history, one record an epoch.

        Raises:
            TrainingError: a loss is no longer finite.
        """
        while self.progress.epoch < self.config.epochs:
            self._train_epoch()
            self._finish_epoch()
        return self.progress.history

    def save(self) -> None:
        """Write the state of training, atomically."""
        tensors = {
            **with_prefix("model", self.model.state_dict()),
            **with_prefix("optimizer", optimizer_tensors(self.optimizer, self.model)),
            **with_prefix("random", random_states()),
            "sums/losses": self.sums.losses,
            "sums/counts": self.sums.counts,
        }
        write_tensors(self.directory / STATE_FILE, tensors, asdict(self.progress))

    def resume(self) -> bool:
        """Continue from the saved state, if there is one; says whether there was.

        Raises:
            CheckpointError: the state cannot be read.
        """
        path = self.directory / STATE_FILE
        if not path.exists():
            return False
        tensors, progress = read_tensors(path)
        try:
            self.model.load_state_dict(section(tensors, "model"))
            load_optimizer_tensors(self.optimizer, self.model, section(tensors, "optimizer"))
            self.sums.losses.copy_(tensors["sums/losses"])
            self.sums.counts.copy_(tensors["sums/counts"])
            self.progress = Progress(**progress)
            restore_random_states(section(tensors, "random"))
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a state of this training: {error}") from None
        return True

    def _train_epoch(self) -> None:
        progress, config = self.progress, self.config
        self.model.train()
        remaining = epoch_batches(self.train_split, config, progress.epoch)[progress.step :]
        for batch in batches(self.train_split, remaining, self.device):
            step = progress.epoch * self.steps_per_epoch + progress.step
            measure = progress.step % config.log_every == 0
            result = self._optimize(batch, step, measure)
            self.sums.add(result, batch.labels, config.threshold)
            if measure:
                self._check_finite()
                self._record_ratio(result.gradient_ratio)
            self.observer.on_step(progress.epoch, progress.step, len(batch), result)
            progress.step += 1
            if config.checkpoint_every and progress.step % config.checkpoint_every == 0:
                self.save()

    def _optimize(self, batch: Any, step: int, measure_ratio: bool) -> StepResult:
        self.optimizer.zero_grad()
        batch = augmented(batch, self.config)
        result = self.algorithm.accumulate_gradients(batch, measure_ratio=measure_ratio)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.steps_per_epoch)
        self.optimizer.step()
        return result

    def _check_finite(self) -> None:
        if not bool(self.sums.losses.isfinite().all()):
            raise TrainingError(
                f"the loss is not finite in epoch {self.progress.epoch + 1}; try a lower learning rate "
                f"(now {self.config.learning_rate:g}) or a smaller clip_norm (now {self.config.clip_norm})"
            )

    def _record_ratio(self, ratio: Tensor | None) -> None:
        if ratio is not None and bool(ratio.isfinite()):
            self.progress.gradient_ratios.append(float(ratio))

    def _finish_epoch(self) -> None:
        progress, config = self.progress, self.config
        self._check_finite()
        loss = self.algorithm.recognition_loss
        valid = evaluate(self.model, self.valid_split, threshold=config.threshold, recognition_loss=loss)
        valid.pop("shift", None)
        ratios = progress.gradient_ratios
        record = {
            "epoch": progress.epoch + 1,
            "train": self.sums.summary(),
            "valid": valid,
            "gradient_ratio": sum(ratios) / len(ratios) if ratios else None,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        progress.history.append(record)
        best = progress.best_epoch
        if best is None or valid[config.selection] > progress.history[best - 1]["valid"][config.selection]:
            progress.best_epoch = record["epoch"]
            # Before the state, so that no state ever speaks of a best model that is not on disk.
            write_tensors(self.directory / BEST_FILE, self.model.state_dict(), self.header)
        progress.epoch, progress.step, progress.gradient_ratios = progress.epoch + 1, 0, []
        self.sums = EpochSums(self.device)
        self.save()
        self.observer.on_epoch(record)

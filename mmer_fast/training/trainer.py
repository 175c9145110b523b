"""The training loop: epochs of Algorithm 1, validation, selection of the best epoch, checkpoints.

What the loop changes is one object (`mmer_fast.training.state`), which goes to files and comes back from them
(`mmer_fast.training.files`). Where the loop cannot go on, `mmer_fast.training.failures` ends it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmer_fast.data import Batch, MultiModalData
from mmer_fast.models.network import Network
from mmer_fast.training.accumulation import accumulate_gradients, micro_batches_of
from mmer_fast.training.algorithm1 import StepResult
from mmer_fast.training.augmentation import augmented
from mmer_fast.training.best import Best, is_better, read_best
from mmer_fast.training.data_parallel import average_gradients, clip_gradients
from mmer_fast.training.distributed import ALONE, World, padded_as_whole
from mmer_fast.training.errors import Terminated
from mmer_fast.training.evaluate import evaluate
from mmer_fast.training.failures import Failures
from mmer_fast.training.files import BEST_FILE, TrainingFiles
from mmer_fast.training.loader import dead_workers_named, training_batches
from mmer_fast.training.loop_config import LoopConfig
from mmer_fast.training.memory import Shortage, unless_short
from mmer_fast.training.order import epoch_batches, steps_per_epoch
from mmer_fast.training.origin import ORIGIN, origin
from mmer_fast.training.schedule import learning_rate
from mmer_fast.training.state import Progress, TrainingState
from mmer_fast.training.steps import chosen_step
from mmer_fast.training.sums import EpochSums
from mmer_fast.training.termination import TerminationRequest


class Observer(Protocol):
    """Who wants to know how training goes."""

    def on_step(self, epoch: int, step: int, samples: int, result: StepResult) -> None:
        """After step `step` of epoch `epoch` (both from 0), over `samples` samples."""

    def on_epoch(self, record: dict[str, Any]) -> None:
        """After each epoch, with its entry of the history."""


class Trainer:
    """Trains a model; keeps its state and the best epoch's model in a directory (`mmer_fast.training.files`).

    Args:
        model: on its device, freshly initialised; `resume` replaces its weights.
        config: how to train.
        data: splits "train" and "valid" are used.
        directory: existing; where the files go.
        header: JSON data stored with the best weights, enough to build the model again; where they come from is added
            (`origin`).
        observer: told about steps and epochs.
        world: the processes that train together, each with such a trainer; `prepare` has readied the model for it.
            Rank 0 writes the files; `resume` wants them where every rank can read them.
    """

    def __init__(
        self,
        model: Network,
        config: LoopConfig,
        data: MultiModalData,
        directory: Path,
        header: dict[str, Any],
        observer: Observer,
        world: World = ALONE,
    ) -> None:
        self.model = model
        self.world = world
        self.config = config
        self.train_split, self.valid_split = data.splits["train"], data.splits["valid"]
        self.header = header
        self.observer = observer
        self.device = next(model.parameters()).device
        self.algorithm = chosen_step(model, config, world)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
        )
        self.steps_per_epoch = steps_per_epoch(self.train_split, config, model.group)
        sums = EpochSums(self.algorithm.losses, model.outputs, self.device)
        self.state = TrainingState(model, self.optimizer, sums, world)
        self.best: Best | None = None
        """What is in `BEST_FILE`; after `resume` it may be of the epoch under way (`mmer_fast.training.best`)."""
        self.files = TrainingFiles(directory, world)
        self.failures = Failures(self.state, self.files, config, data)
        self.termination = TerminationRequest()

    @property
    def progress(self) -> Progress:
        """Where training is."""
        return self.state.progress

    def resume(self) -> bool:
        """Continue from the saved state, if there is one; says whether there was.

        Where it is damaged or missing and the one before it is whole, that one is taken, with a UserWarning.

        Raises:
            CheckpointError: no state can be read, or the best model that it speaks of is missing, damaged or another.
            WorldError: some processes could read the last state, others not.
        """
        saved = self.files.read_state()
        if saved is not None:
            self.state.restore(saved)
        progress, path = self.progress, self.files.directory / BEST_FILE
        expected, selection = self.model.state_dict(), self.config.selection
        self.best = read_best(path, expected, progress.history, progress.best_epoch, selection)
        if saved is not None and saved.unusable and self.world.first:
            going_on = f"going on from the state before it, {saved.path}, after {progress.place}"
            warnings.warn(f"{saved.unusable}; {going_on}", stacklevel=2)
        return saved is not None

    def save(self) -> None:
        """Write the state of training, atomically.

        Raises:
            TrainingError: it is not finite, or cannot be written; the state that was saved before is kept.
        """
        self.failures.check_state()
        self.files.write_state(self.state)

    def fit(self) -> list[dict[str, Any]]:
        """Train from where `progress` stands to the last epoch; returns the history, one record an epoch.

        With `TrainConfig.patience` the last epoch may be an earlier one than `TrainConfig.epochs`.

        Raises:
            TrainingError: a loss or a weight is no longer finite, memory runs out in a step or in validation, a file
                cannot be written, or a worker of `TrainConfig.workers` has died.
            Terminated: SIGTERM came; the state is saved.
        """
        with self.termination:
            while self.progress.epoch < self.config.epochs and not self.stopped_early:
                with dead_workers_named(self.config.workers):
                    self._train_epoch()
                self._finish_epoch()
                if self._asked_to_leave(True):
                    raise Terminated
        return self.progress.history

    @property
    def stopped_early(self) -> bool:
        """Whether as many epochs as `TrainConfig.patience` have passed since the best one; never while pretraining."""
        best, patience = self.progress.best_epoch, self.config.patience
        if patience is None or best is None or self.model.pretraining:
            return False
        return self.progress.epoch - best >= patience

    def _train_epoch(self) -> None:
        self.model.start_epoch(self.progress.epoch)
        self.model.train()
        try:
            unless_short(self._train_rest_of_epoch)
        except Shortage as short:
            self.failures.stop_short_of_memory(short)

    def _train_rest_of_epoch(self) -> None:
        progress, config, group = self.progress, self.config, self.model.group
        remaining = epoch_batches(self.train_split, config, progress.epoch, group)[progress.step :]
        micro_batches = [micro_batches_of(indices_b, config, group) for indices_b in remaining]
        own = [torch.cat([self.world.part(indices_b) for indices_b in parts]) for parts in micro_batches]
        extras = self.model.training_extras
        with closing(training_batches(self.train_split, own, self.device, config.workers, extras)) as batches:
            self._train_on(zip(remaining, micro_batches, batches, strict=True))

    def _train_on(self, batches: Iterable[tuple[Tensor, Sequence[Tensor], Batch]]) -> None:
        """Steps on batches: sample indices, those of the micro-batches, this rank's samples."""
        progress, config = self.progress, self.config
        for indices_b, parts, batch in batches:
            step = progress.epoch * self.steps_per_epoch + progress.step
            measure = progress.step % config.log_every == 0
            result = self._optimize(parts, batch, step, measure)
            labels_bk = batch.labels if self.world.group is None else self._labels(indices_b)
            self.state.sums.add(result, labels_bk, config.threshold)
            if measure:
                self._record_ratio(result.gradient_ratio)
            self.observer.on_step(progress.epoch, progress.step, len(indices_b), result)
            progress.step += 1
            leave = self._asked_to_leave(measure)
            if leave or (config.checkpoint_every and progress.step % config.checkpoint_every == 0):
                self.save()
            if leave:
                raise Terminated

    def _optimize(self, micro_batches: Sequence[Tensor], batch: Batch, step: int, measure_ratio: bool) -> StepResult:
        """A step on these samples, of which `batch` has this rank's parts; the result is that of all ranks."""
        world = self.world
        if world.group is not None:
            batch = padded_as_whole(batch, self.train_split, torch.cat(list(micro_batches)))
        self.optimizer.zero_grad()
        batch = augmented(batch, self.config)
        result = accumulate_gradients(self.algorithm, batch, micro_batches, measure_ratio=measure_ratio)
        average_gradients(self.model.parameters(), world)
        if measure_ratio or self.device.type == "cpu":  # elsewhere it would make every step wait for the device
            self.failures.check_losses(batch, result.losses)
        if self.config.clip_norm is not None:
            clip_gradients(self.model.parameters(), self.config.clip_norm, world)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.steps_per_epoch)
        self.optimizer.step()
        return result

    def _labels(self, indices_b: Tensor) -> Tensor:
        return torch.from_numpy(self.train_split.labels[indices_b.numpy()]).to(self.device)

    def _record_ratio(self, ratio: Tensor | None) -> None:
        if ratio is not None and bool(ratio.isfinite()):
            self.progress.gradient_ratios.append(float(ratio))

    def _asked_to_leave(self, ask_others: bool) -> bool:
        """Whether SIGTERM has come to any rank. To know that they have to wait for each other, so not at every step."""
        received = self.termination.received
        if self.world.group is None:
            return received
        return ask_others and any(self.world.gather_objects(received))

    def _finish_epoch(self) -> None:
        progress, config = self.progress, self.config
        self.failures.check_state()
        valid = self._validate()
        ratios = progress.gradient_ratios
        last_step = (progress.epoch + 1) * self.steps_per_epoch - 1
        record: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "train": self.state.sums.summary(),
            "valid": valid,
            "gradient_ratio": sum(ratios) / len(ratios) if ratios else None,
            "learning_rate": learning_rate(config, last_step, self.steps_per_epoch),
        }
        if self.model.pretraining:
            record["pretraining"] = True
        progress.history.append(record)
        progress.best_epoch = self._keep_if_better(record)
        self.state.end_epoch()
        self.save()
        self.observer.on_epoch(record)

    def _validate(self) -> dict[str, Any]:
        """The metrics of the model as it is on the validation split."""
        config, loss = self.config, self.algorithm.recognition_loss
        options: dict[str, Any] = {"threshold": config.threshold, "batch_size": config.evaluation_batch_size}
        try:
            valid = unless_short(
                lambda: evaluate(self.model, self.valid_split, recognition_loss=loss, world=self.world, **options)
            )
        except FloatingPointError as error:
            self.failures.stop_validation(error)
        except Shortage as short:
            self.failures.stop_validation_short_of_memory(short)
        valid.pop("shift", None)
        return valid

    def _keep_if_better(self, record: dict[str, Any]) -> int:
        """Write the model of the epoch that `record`, the last of the history, is of, if it is better than the one on
        disk; the epoch of the one that is then there.
        """
        config, best, epoch = self.config, self.best, record["epoch"]
        value = record["valid"][config.selection]
        if is_better(self.progress.history, best, config.selection):
            # Before the state, so that no state ever speaks of a best model that is not on disk.
            header = {**self.header, ORIGIN: origin(record, config, self.steps_per_epoch)}
            self.files.write_best(self.state, header)
            best = self.best = Best(epoch, value)
        elif best is not None and best.epoch == epoch and self.world.first:
            warnings.warn(
                f"epoch {epoch}, trained again, has a validation {config.selection} of {value:.4f}; the model that was "
                f"saved of it before has {best.value:.4f} and is kept",
                stacklevel=2,
            )
        assert best is not None  # the first model is better than none
        return best.epoch

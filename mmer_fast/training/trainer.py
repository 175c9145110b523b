"""The training loop: epochs of Algorithm 1, validation, selection of the best epoch, checkpoints.

Everything that a step depends on is in the checkpoint: weights, optimiser, random generators, the place in
the data order (a permutation seeded by seed and epoch) and the running sums of the epoch. So training that
was killed at any moment and resumed ends with the same bits as training that was not, on the same machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from mmer_fast._files import WriteError
from mmer_fast.data import Batch, MultiModalData
from mmer_fast.models.network import Network
from mmer_fast.training.accumulation import accumulate_gradients, micro_batches_of
from mmer_fast.training.algorithm1 import StepResult
from mmer_fast.training.augmentation import augmented
from mmer_fast.training.best import Best, is_better, read_best
from mmer_fast.training.checkpoint import (
    CheckpointError,
    load_optimizer_tensors,
    optimizer_tensors,
    random_states,
    read_last_state,
    restore_random_states,
    section,
    with_prefix,
    write_tensors,
)
from mmer_fast.training.data_parallel import average_gradients, clip_gradients, gathered, scattered
from mmer_fast.training.distributed import ALONE, World, padded_as_whole
from mmer_fast.training.errors import Terminated, TrainingError
from mmer_fast.training.evaluate import evaluate
from mmer_fast.training.finite import (
    first_loss,
    first_nonfinite,
    gradients,
    inputs,
    is_finite,
    optimizer_state,
    parameters,
)
from mmer_fast.training.loader import dead_workers_named, training_batches
from mmer_fast.training.loop_config import LoopConfig
from mmer_fast.training.memory import (
    Shortage,
    evaluation_size,
    smaller_evaluation,
    smaller_settings,
    step_size,
    unless_short,
)
from mmer_fast.training.order import epoch_batches, steps_per_epoch
from mmer_fast.training.origin import ORIGIN, origin
from mmer_fast.training.schedule import learning_rate
from mmer_fast.training.steps import chosen_step
from mmer_fast.training.sums import EpochSums
from mmer_fast.training.termination import TerminationRequest

STATE_FILE = "state.safetensors"
PREVIOUS_FILE = "state.previous.safetensors"
"""The state before the one in `STATE_FILE`, for when that is damaged."""
BEST_FILE = "model.safetensors"
FAILED_FILE = "failed.safetensors"
"""The state at a loss or weight that was not finite, or where memory ran out: as in `STATE_FILE`, and the header also
has the positions of the samples of the step in the training split under "batch".
"""


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


class Trainer:
    """Trains a model; keeps `state.safetensors` and `model.safetensors` (the best epoch) in a directory.

    The state before the last one stays as `state.previous.safetensors`: `resume` falls back to it.

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
        self.directory = directory
        self.header = header
        self.observer = observer
        self.device = next(model.parameters()).device
        self.algorithm = chosen_step(model, config, world)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
        )
        self.steps_per_epoch = steps_per_epoch(self.train_split, config, model.group)
        self.progress = Progress()
        self.best: Best | None = None
        """What is in `BEST_FILE`; after `resume` it may be of the epoch under way (`mmer_fast.training.best`)."""
        self.sums = self._no_sums()
        self.state_is_whole = False
        """Whether `STATE_FILE` is known to be whole: written or read by this trainer. A damaged one replaces none."""
        self.termination = TerminationRequest()

    def _no_sums(self) -> EpochSums:
        return EpochSums(self.algorithm.losses, self.model.outputs, self.device)

    def _batches_of(self, epoch: int) -> list[Tensor]:
        return epoch_batches(self.train_split, self.config, epoch, self.model.group)

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

    def save(self) -> None:
        """Write the state of training, atomically.

        Raises:
            TrainingError: it is not finite, or cannot be written; the state that was saved before is kept.
        """
        self._check_state()
        previous = PREVIOUS_FILE if self.state_is_whole else None
        self._write(STATE_FILE, self._state(), asdict(self.progress), previous)
        self.state_is_whole = True

    def _state(self) -> dict[str, Tensor]:
        """What every rank has to come together for."""
        return {
            **with_prefix("model", gathered(self.model.state_dict())),
            **with_prefix("optimizer", gathered(optimizer_tensors(self.optimizer, self.model))),
            **with_prefix("random", random_states(self.world)),
            "sums/losses": self.sums.losses,
            "sums/counts": self.sums.counts,
        }

    def _write(
        self, name: str, tensors: dict[str, Tensor], header: dict[str, Any], previous: str | None = None
    ) -> None:
        if not self.world.first:
            return
        keep = None if previous is None else self.directory / previous
        try:
            unless_short(lambda: write_tensors(self.directory / name, tensors, header, keep_previous_as=keep))
        except WriteError as error:
            raise TrainingError(f"{error}; {self._saved_before('go on by --resume')}") from None
        except Shortage as short:
            what = f"memory ran out while {self.directory / name} was written: {short}"
            raise TrainingError(f"{what}; {self._saved_before('--resume goes on where more is free')}") from None

    def _saved_before(self, advice: str) -> str:
        """Whether there is a state to go on from, in words, and if so the advice."""
        saved = any((self.directory / state).exists() for state in (STATE_FILE, PREVIOUS_FILE))
        return f"the state saved before is whole: {advice}" if saved else "no state was saved before"

    def resume(self) -> bool:
        """Continue from the saved state, if there is one; says whether there was.

        Where it is damaged or missing and the one before it is whole, that one is taken, with a UserWarning.

        Raises:
            CheckpointError: no state can be read, or the best model that it speaks of is missing, damaged or another.
            WorldError: some processes could read the last state, others not.
        """
        saved = read_last_state(self.directory / STATE_FILE, self.directory / PREVIOUS_FILE)
        self.world.agree({"saved state": saved and saved.path.name})
        if saved is None:
            self.best = self._read_best()
            return False
        path, tensors = saved.path, saved.tensors
        try:
            self.model.load_state_dict(scattered(section(tensors, "model"), self.model))
            optimizer = scattered(section(tensors, "optimizer"), self.model)
            load_optimizer_tensors(self.optimizer, self.model, optimizer)
            self.sums.losses.copy_(tensors["sums/losses"])
            self.sums.counts.copy_(tensors["sums/counts"])
            self.progress = Progress(**saved.header)
            restore_random_states(section(tensors, "random"), self.world)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a state of this training: {error}") from None
        self.best = self._read_best()
        self.state_is_whole = not saved.unusable
        if saved.unusable and self.world.first:
            epoch, step = self.progress.epoch, self.progress.step
            place = f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"
            warnings.warn(f"{saved.unusable}; going on from the state before it, {path}, after {place}", stacklevel=2)
        return True

    def _read_best(self) -> Best | None:
        progress = self.progress
        expected, path = self.model.state_dict(), self.directory / BEST_FILE
        return read_best(path, expected, progress.history, progress.best_epoch, self.config.selection)

    def _train_epoch(self) -> None:
        self.model.start_epoch(self.progress.epoch)
        self.model.train()
        try:
            unless_short(self._train_rest_of_epoch)
        except Shortage as short:
            self._stop_short_of_memory(str(short))

    def _train_rest_of_epoch(self) -> None:
        progress, config = self.progress, self.config
        remaining = self._batches_of(progress.epoch)[progress.step :]
        micro_batches = [micro_batches_of(indices_b, config, self.model.group) for indices_b in remaining]
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
            self.sums.add(result, labels_bk, config.threshold)
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
            self._check_losses(batch, result.losses)
        if self.config.clip_norm is not None:
            clip_gradients(self.model.parameters(), self.config.clip_norm, world)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.steps_per_epoch)
        self.optimizer.step()
        return result

    def _asked_to_leave(self, ask_others: bool) -> bool:
        """Whether SIGTERM has come to any rank. To know that they have to wait for each other, so not at every step."""
        received = self.termination.received
        if self.world.group is None:
            return received
        return ask_others and any(self.world.gather_objects(received))

    def _labels(self, indices_b: Tensor) -> Tensor:
        return torch.from_numpy(self.train_split.labels[indices_b.numpy()]).to(self.device)

    def _check_losses(self, batch: Batch, losses: Tensor) -> None:
        """Stop where the losses of the step under way, not yet in the sums, or those of earlier ones are not finite."""
        if is_finite(self.sums.losses + losses):
            return
        names = self.algorithm.losses
        groups = (inputs(batch), parameters(self.model), gradients(self.model))
        culprit = next(filter(None, (self._on_any_rank(first_nonfinite(group)) for group in groups)), None)
        if is_finite(self.sums.losses):
            self._stop(f"the {first_loss(losses, names)} loss is not finite", culprit, self.progress.step + 1)
        self._stop(
            f"the {first_loss(self.sums.losses, names)} loss is not finite", culprit, self.progress.step, exact=False
        )

    def _check_state(self) -> None:
        """Stop where the losses so far, the weights or the state of the optimizer are not finite."""
        names = self.algorithm.losses
        moments = optimizer_state(optimizer_tensors(self.optimizer, self.model))
        culprit = self._on_any_rank(first_nonfinite(parameters(self.model), moments))
        if not is_finite(self.sums.losses):
            what = f"the {first_loss(self.sums.losses, names)} loss is not finite"
            self._stop(what, culprit, self.progress.step, exact=False)
        if culprit is not None:
            cause = self._on_any_rank(first_nonfinite(gradients(self.model))) or culprit
            self._stop("the weights after the optimizer step are not finite", cause, self.progress.step)

    def _on_any_rank(self, found: str | None) -> str | None:
        """What the first rank has found that has found something; every rank has its own samples and shards."""
        return next((name for name in self.world.gather_objects(found) if name is not None), None)

    def _stop(self, what: str, culprit: str | None, step: int, *, exact: bool = True) -> NoReturn:
        """Keep the state for a post-mortem and end training at, or shortly before, step `step` (from 1)."""
        progress, config = self.progress, self.config
        kept = self._keep_failed(self._batches_of(progress.epoch)[step - 1])
        self.world.wait()  # none may end, and with it all, before it is on disk
        place = f"step {step}" if exact else f"in one of the {min(step, config.log_every)} steps up to step {step}"
        raise TrainingError(
            f"{what} in epoch {progress.epoch + 1}, {place}; first tensor that is not: {culprit or 'none'}; "
            f"{kept}; try a lower learning rate (now {config.learning_rate:g}) or a smaller clip_norm "
            f"(now {config.clip_norm})"
        )

    def _keep_failed(self, indices_b: Tensor) -> str:
        """Write the state, and which samples the step had; in words where it is, or why it is nowhere."""
        path = self.directory / FAILED_FILE
        state = self._state()
        try:
            if self.world.first:
                write_tensors(path, state, {**asdict(self.progress), "batch": indices_b.tolist()})
        except WriteError as error:
            return str(error)
        return f"the state is in {path}"

    def _stop_short_of_memory(self, cause: str) -> NoReturn:
        """End training in the step under way. Of several processes this one alone may be short: it asks no other."""
        progress, config, group = self.progress, self.config, self.model.group
        step = min(progress.step, self.steps_per_epoch - 1)
        indices_b = self._batches_of(progress.epoch)[step]
        own = [self.world.part(part) for part in micro_batches_of(indices_b, config, group)]
        kept = ""
        if self.world.group is None:
            try:
                kept = f"{self._keep_failed(indices_b)}; "
            except (MemoryError, RuntimeError):
                kept = "there is no memory to write the state; "
        raise TrainingError(
            f"memory ran out in epoch {progress.epoch + 1}, step {step + 1}: {cause}; the step has "
            f"{step_size(self.train_split, own)}; {kept}{self._saved_before('--resume goes on where more is free')}; "
            f"a new run needs less with {' or '.join(smaller_settings(config, whole=group is not None))}"
        )

    def _validate(self) -> dict[str, Any]:
        """The metrics of the model as it is on the validation split."""
        config, loss = self.config, self.algorithm.recognition_loss
        options: dict[str, Any] = {"threshold": config.threshold, "batch_size": config.evaluation_batch_size}
        try:
            valid = unless_short(
                lambda: evaluate(self.model, self.valid_split, recognition_loss=loss, world=self.world, **options)
            )
        except FloatingPointError as error:  # of finite weights that overflow
            self._stop(f"{error} on the validation split", None, self.progress.step)
        except Shortage as short:
            self._stop_validation_short_of_memory(str(short))
        valid.pop("shift", None)
        return valid

    def _stop_validation_short_of_memory(self, cause: str) -> NoReturn:
        """End training between the last step of an epoch and its validation, from where it can go on."""
        split, config, group = self.valid_split, self.config, self.model.group
        raise TrainingError(
            f"memory ran out in the validation after epoch {self.progress.epoch + 1}: {cause}; "
            f"{evaluation_size(split, config, group)}; {self._save_for_validation()}; it needs less with "
            f"{smaller_evaluation(split, config, group)}"
        )

    def _save_for_validation(self) -> str:
        """Write the state, unless other processes would have to come together for it; in words what there is."""
        if self.world.group is not None:
            return self._saved_before("--resume goes on")
        try:
            self.save()
        except TrainingError as error:
            return str(error)
        return "the state is saved: --resume goes on with the validation"

    def _record_ratio(self, ratio: Tensor | None) -> None:
        if ratio is not None and bool(ratio.isfinite()):
            self.progress.gradient_ratios.append(float(ratio))

    def _finish_epoch(self) -> None:
        progress, config = self.progress, self.config
        self._check_state()
        valid = self._validate()
        ratios = progress.gradient_ratios
        last_step = (progress.epoch + 1) * self.steps_per_epoch - 1
        record: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "train": self.sums.summary(),
            "valid": valid,
            "gradient_ratio": sum(ratios) / len(ratios) if ratios else None,
            "learning_rate": learning_rate(config, last_step, self.steps_per_epoch),
        }
        if self.model.pretraining:
            record["pretraining"] = True
        progress.history.append(record)
        progress.best_epoch = self._keep_if_better(record)
        progress.epoch, progress.step, progress.gradient_ratios = progress.epoch + 1, 0, []
        self.sums = self._no_sums()
        self.save()
        self.observer.on_epoch(record)

    def _keep_if_better(self, record: dict[str, Any]) -> int:
        """Write the model of the epoch that `record`, the last of the history, is of, if it is better than the one on
        disk; the epoch of the one that is then there.
        """
        config, best, epoch = self.config, self.best, record["epoch"]
        value = record["valid"][config.selection]
        if is_better(self.progress.history, best, config.selection):
            # Before the state, so that no state ever speaks of a best model that is not on disk.
            header = {**self.header, ORIGIN: origin(record, config, self.steps_per_epoch)}
            self._write(BEST_FILE, gathered(self.model.state_dict()), header)
            best = self.best = Best(epoch, value)
        elif best is not None and best.epoch == epoch and self.world.first:
            warnings.warn(
                f"epoch {epoch}, trained again, has a validation {config.selection} of {value:.4f}; the model that was "
                f"saved of it before has {best.value:.4f} and is kept",
                stacklevel=2,
            )
        assert best is not None  # of no model a first one is better
        return best.epoch

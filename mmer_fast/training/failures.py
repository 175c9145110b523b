"""How training stops where it cannot go on: a loss or weight that is not finite, or memory that ran out.

It ends with a `TrainingError` of one line: what happened in which step, what is kept on disk, what to try. The losses
are looked at where training reads them anyway, weights and optimiser before a state is saved, so that every saved state
is finite. Which tensor it began with is looked for only then (`mmer_fast.training.finite`).

Where processes train together, what is not finite ends all of them, and they come together for its state. Memory may
run out in one alone: that one asks nothing of the others, and so keeps no state.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from mmer_fast.data import Batch, MultiModalData
from mmer_fast.training.accumulation import micro_batches_of
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.files import TrainingFiles
from mmer_fast.training.finite import (
    first_loss,
    first_nonfinite,
    gradients,
    inputs,
    is_finite,
    optimizer_state,
    parameters,
)
from mmer_fast.training.loop_config import LoopConfig
from mmer_fast.training.memory import (
    Shortage,
    evaluation_size,
    smaller_evaluation,
    smaller_settings,
    step_size,
)
from mmer_fast.training.order import epoch_batches
from mmer_fast.training.state import TrainingState, optimizer_tensors


class Failures:
    """Notices that a training cannot go on, and ends it.

    Args:
        state: of the training.
        files: of it.
        config: of it.
        data: its splits "train" and "valid".
    """

    def __init__(self, state: TrainingState, files: TrainingFiles, config: LoopConfig, data: MultiModalData) -> None:
        self.state, self.files, self.config = state, files, config
        self.train_split, self.valid_split = data.splits["train"], data.splits["valid"]
        self.world = state.world

    def check_losses(self, batch: Batch, losses: Tensor) -> None:
        """Stop where the losses of the step under way, not yet in the sums, or those of earlier ones are not finite."""
        sums, model = self.state.sums, self.state.model
        if is_finite(sums.losses + losses):
            return
        groups = (inputs(batch), parameters(model), gradients(model))
        culprit = next(filter(None, (self._on_any_rank(first_nonfinite(group)) for group in groups)), None)
        if is_finite(sums.losses):
            what = f"the {first_loss(losses, sums.names)} loss is not finite"
            self._stop(what, culprit, self.state.progress.step + 1)
        self._stop_at_sums(culprit)

    def check_state(self) -> None:
        """Stop where the losses so far, the weights or the state of the optimizer are not finite."""
        model = self.state.model
        moments = optimizer_state(optimizer_tensors(self.state.optimizer, model))
        culprit = self._on_any_rank(first_nonfinite(parameters(model), moments))
        if not is_finite(self.state.sums.losses):
            self._stop_at_sums(culprit)
        if culprit is not None:
            cause = self._on_any_rank(first_nonfinite(gradients(model))) or culprit
            self._stop("the weights after the optimizer step are not finite", cause, self.state.progress.step)

    def stop_validation(self, error: FloatingPointError) -> NoReturn:
        """End training between the last step of an epoch and its validation, where finite weights overflow."""
        self._stop(f"{error} on the validation split", None, self.state.progress.step)

    def stop_short_of_memory(self, short: Shortage) -> NoReturn:
        """End training in the step under way."""
        progress, config, group = self.state.progress, self.config, self.state.model.group
        batches = self._batches()
        step = min(progress.step, len(batches) - 1)
        own = [self.world.part(part) for part in micro_batches_of(batches[step], config, group)]
        raise TrainingError(
            f"memory ran out in epoch {progress.epoch + 1}, step {step + 1}: {short}; the step has "
            f"{step_size(self.train_split, own)}; {self._keep_short_of_memory(batches[step])}"
            f"{self.files.saved_before('--resume goes on where more is free')}; "
            f"a new run needs less with {' or '.join(smaller_settings(config, whole=group is not None))}"
        )

    def stop_validation_short_of_memory(self, short: Shortage) -> NoReturn:
        """End training between the last step of an epoch and its validation, from where it can go on."""
        split, config, group = self.valid_split, self.config, self.state.model.group
        raise TrainingError(
            f"memory ran out in the validation after epoch {self.state.progress.epoch + 1}: {short}; "
            f"{evaluation_size(split, config, group)}; {self._save_for_validation()}; it needs less with "
            f"{smaller_evaluation(split, config, group)}"
        )

    def _on_any_rank(self, found: str | None) -> str | None:
        """What the first rank has found that has found something; every rank has its own samples and shards."""
        return next((name for name in self.world.gather_objects(found) if name is not None), None)

    def _batches(self) -> list[Tensor]:
        """Those of the epoch under way."""
        return epoch_batches(self.train_split, self.config, self.state.progress.epoch, self.state.model.group)

    def _stop_at_sums(self, culprit: str | None) -> NoReturn:
        """End training where the losses of a step, the last one or one before it, are not finite."""
        sums, step = self.state.sums, self.state.progress.step
        self._stop(f"the {first_loss(sums.losses, sums.names)} loss is not finite", culprit, step, exact=False)

    def _stop(self, what: str, culprit: str | None, step: int, *, exact: bool = True) -> NoReturn:
        """Keep the state for a post-mortem and end training at, or shortly before, step `step` (from 1)."""
        config = self.config
        kept = self.files.write_failed(self.state, self._batches()[step - 1])
        self.world.wait()  # no process may end, which ends them all, before it is on disk
        place = f"step {step}" if exact else f"in one of the {min(step, config.log_every)} steps up to step {step}"
        raise TrainingError(
            f"{what} in epoch {self.state.progress.epoch + 1}, {place}; first tensor that is not: {culprit or 'none'}; "
            f"{kept}; try a lower learning rate (now {config.learning_rate:g}) or a smaller clip_norm "
            f"(now {config.clip_norm})"
        )

    def _keep_short_of_memory(self, indices_b: Tensor) -> str:
        """Write the state for a post-mortem, unless processes have to come together; a part of a line about it."""
        if self.world.group is not None:
            return ""
        try:
            return f"{self.files.write_failed(self.state, indices_b)}; "
        except (MemoryError, RuntimeError):
            return "there is no memory to write the state; "

    def _save_for_validation(self) -> str:
        """Write the state, which the end of the epoch has checked, unless processes have to come together for it; in
        words what there is.
        """
        if self.world.group is not None:
            return self.files.saved_before("--resume goes on")
        try:
            self.files.write_state(self.state)
        except TrainingError as error:
            return str(error)
        return "the state is saved: --resume goes on with the validation"

"""What a system is to the trainer, the report and the commands: a network with an objective, and facts about it.

RobMMR has a training step of its own (Algorithm 1 takes three backward passes). The sister systems have a loss each, so
they are a `SystemModel`: `objective` gives the loss that one backward pass goes through, `logits` what is predicted.

Shapes: B samples, N samples of a split, K labels, P parts of the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from mmer_fast.data import Batch, MultiModalData, Split
from mmer_fast.models.outputs import LABELS, Outputs


@dataclass(frozen=True)
class Objective:
    """The loss of a batch.

    Attributes:
        total: scalar, whose gradient the optimizer follows.
        parts: (P,) detached, in the order of `SystemModel.loss_names`, each not weighted; 0 for a part left out.
        logits: (B, K) detached.
    """

    total: Tensor
    parts: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Preset:
    """Settings under a name: fields of the system's configuration, and of `LoopConfig`."""

    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


class SystemModel(nn.Module, ABC):
    """A network that the trainer can train, evaluate, save and build again.

    Args:
        modalities: modality → feature size D; features arrive in this order.
        labels: K.
        config: of `config_class`.

    Everything that `logits` needs of the training data (`fit`) belongs into buffers, so that the checkpoint has it.
    """

    config_class: ClassVar[type]
    """A frozen dataclass of JSON values, checked in `__post_init__` (`mmer_fast.models.config.check_types`)."""
    presets: ClassVar[Mapping[str, Preset]]
    """"compact" (small, for a CPU; the default) and "authors" (as published), perhaps more."""
    loss_names: ClassVar[tuple[str, ...]]
    """Names of the parts of the loss; the first is the recognition loss."""
    input_extras: ClassVar[tuple[str, ...]] = ()
    """Extras of the split that `Batch.extras` has whenever the model is given a batch, such as speakers."""
    target_extras: ClassVar[tuple[str, ...]] = ()
    """Extras that `objective` needs as well, as labels are: "va_*" stands for one of each modality."""
    group: ClassVar[str | None] = None
    """One of `input_extras`, integers: samples that share a value (a dialogue) are in one batch, in the order of the
    split. `LoopConfig.batch_size` counts groups then.
    """

    def __init__(self, modalities: Mapping[str, int], labels: int, config: Any) -> None:
        super().__init__()
        self.modalities = dict(modalities)
        self.labels = labels
        self.config = config

    @property
    def outputs(self) -> Outputs:
        """What logits mean."""
        return LABELS

    @classmethod
    def check_data(cls, data: MultiModalData, config: Any) -> None:
        """Refuse data that this system cannot be trained on.

        Raises:
            DataError: saying what is missing and which data has it.
        """

    def fit(self, split: Split) -> None:
        """Take what is fixed before training from the training split (statistics, CCA, ...), into buffers."""

    def start_epoch(self, epoch: int) -> None:
        """Before the first step of epoch `epoch` (from 0) and on resumption within it; must not draw random numbers."""

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """(B, K), differentiable; `batch` is on the device of the model. Labels must not be looked at."""

    @abstractmethod
    def objective(self, batch: Batch) -> Objective:
        """The loss of a batch, in training mode."""

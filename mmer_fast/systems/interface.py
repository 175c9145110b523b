"""What a system is to the trainer, the report and the commands: a network with an objective, and facts about it.

RobMMR has a training step of its own (Algorithm 1 takes three backward passes). The sister systems have a loss each, so
they are a `SystemModel`: `objective` gives the loss that one backward pass goes through, `logits` what is predicted.

Shapes: B samples, K labels, P parts of the loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from mmer_fast.data import Batch, MultiModalData
from mmer_fast.models.network import Network
from mmer_fast.models.robmmr import check_outline


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


class SystemModel(Network):
    """A `Network` whose training follows one loss.

    Its properties `outputs` and `training_extras` follow from `modalities`, `labels` and `config` alone, so that they
    are known before there is a layer (`outline`).
    """

    config_class: ClassVar[type]
    """A frozen dataclass of JSON values, checked in `__post_init__` (`mmer_fast.models.config.check_types`)."""
    presets: ClassVar[Mapping[str, Preset]]
    """"compact" (small, for a CPU; the default) and "authors" (as published), perhaps more."""
    loss_names: ClassVar[tuple[str, ...]]
    """Names of the parts of the loss; the first is "recognition"."""

    @classmethod
    def check_data(cls, data: MultiModalData, config: Any) -> None:
        """Refuse data that this system cannot be trained on.

        Raises:
            DataError: saying what is missing and which data has it.
        """

    @classmethod
    def check_outline(cls, modalities: Mapping[str, int], labels: int, config: Any) -> None:
        """Check what a network is to be built for, without building it.

        Raises:
            ValueError: as the constructor does.
        """
        check_outline(modalities, labels)

    @classmethod
    def outline(cls, modalities: Mapping[str, int], labels: int, config: Any) -> SystemModel:
        """A network without layers: it says what one would be, and computes nothing.

        Raises:
            ValueError: none can be built (`check_outline`).
        """
        cls.check_outline(modalities, labels, config)
        network = cls.__new__(cls)
        Network.__init__(network, modalities, labels, config)
        return network

    @abstractmethod
    def objective(self, batch: Batch) -> Objective:
        """The loss of a batch, in training mode."""

"""What training, evaluation and report ask of a network, whatever it is made of.

Shapes: B samples, N samples of a split, K labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmer_fast.data import Batch, MultiModalData, Split
from mmer_fast.models.outputs import LABELS, Outputs


class Network(nn.Module, ABC):
    """A network from batches to label logits that can be trained, evaluated, saved and built again.

    Everything that `logits` needs of the training data (`fit`) belongs into buffers, so that a checkpoint has it.

    Args:
        modalities: modality → feature size D; features arrive in this order.
        labels: K.
        config: a frozen dataclass of JSON values.
    """

    input_extras: ClassVar[tuple[str, ...]] = ()
    """Extras of the split that `Batch.extras` has whenever the model is given a batch, such as speakers."""
    target_extras: ClassVar[tuple[str, ...]] = ()
    """Extras that training needs as well, as labels are: "va_*" stands for one of each modality."""
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
    def check_inputs(cls, data: MultiModalData, config: Any) -> None:
        """Refuse data without what `logits` needs beside the features.

        Raises:
            DataError: saying what is missing, and in which split.
        """

    def fit(self, split: Split) -> None:
        """Take what is fixed before training from the training split (statistics, CCA, ...), into buffers."""

    def start_epoch(self, epoch: int) -> None:
        """Called before the first step of epoch `epoch` (from 0), and on resumption within it; draws nothing random."""

    @property
    def pretraining(self) -> bool:
        """Whether only a part of the network is trained so far. No such epoch is better than one of the whole."""
        return False

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """(B, K), differentiable; `batch` is on the device of the model, and its labels are not looked at."""

    def recognition_loss(self, logits_nk: Tensor, labels_nk: Tensor) -> Tensor:
        """Scalar: what validation reports as the loss. Binary cross-entropy, or that of the classes."""
        if self.outputs.activation == "sigmoid":
            return F.binary_cross_entropy_with_logits(logits_nk, labels_nk)
        return -(labels_nk * logits_nk.log_softmax(dim=1)).sum(dim=1).mean()

    @property
    def training_extras(self) -> tuple[str, ...]:
        """The extras of a training batch, by their whole names."""
        targets = [
            name.replace("*", modality)
            for name in self.target_extras
            for modality in (self.modalities if "*" in name else ("",))
        ]
        return (*self.input_extras, *targets)

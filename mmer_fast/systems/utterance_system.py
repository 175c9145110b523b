"""What the systems share that encode an utterance as one vector a modality.

Shape suffixes: b batch, t time, f features, m modalities, d width, n samples of a split, k labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmer_fast.data import Batch, DataError, MultiModalData, Split
from mmer_fast.models.config import check_types, require
from mmer_fast.models.outputs import CLASSES, LABELS, Outputs
from mmer_fast.models.standardization import Standardization, fit_standardization
from mmer_fast.systems.interface import SystemModel
from mmer_fast.systems.utterance import utterance_encoders


@dataclass(frozen=True)
class UtteranceConfig:
    """The encoders of an `UtteranceSystem`, and what it recognises.

    Attributes:
        outputs: "classes" (exactly one label a sample: softmax, cross-entropy) or "labels" (any number: sigmoid, binary
            cross-entropy).
        dim: width D of each modality's embedding.
        text_cnn: names of the modalities that a TextCNN encodes, joined by "+"; an LSTM encodes the others. None:
            "text", if there is such a modality.
        pooling: of the LSTM's states over time: their maximum ("max") or the "last" one.
        channels: feature maps of each kernel size of the TextCNN.
        text_dropout: on the maxima of the TextCNN's feature maps.
        standardize: bring every feature to mean 0 and standard deviation 1 of the training data.
    """

    outputs: Literal["classes", "labels"] = "classes"
    dim: int = 128
    text_cnn: str | None = None
    pooling: Literal["max", "last"] = "max"
    channels: int = 128
    text_dropout: float = 0.5
    standardize: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("dim", "channels"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "text_dropout", 0 <= self.text_dropout < 1, "in [0, 1)")

    def text_modalities(self, modalities: Mapping[str, int]) -> list[str]:
        """The modalities that a TextCNN encodes.

        Raises:
            ValueError: `text_cnn` names one that is not there.
        """
        if self.text_cnn is None:
            return [name for name in modalities if name == "text"]
        named = [name for name in self.text_cnn.split("+") if name]
        require(self, "text_cnn", set(named) <= set(modalities), f"some of {', '.join(modalities)}, joined by '+'")
        return named


class UtteranceSystem(SystemModel):
    """A system whose encoders read one modality each; a modality of length 0 is missing.

    Args:
        modalities: name → feature size.
        labels: K.
        config: a subclass of `UtteranceConfig`.

    Raises:
        ValueError: a name, size or number is out of range, or `text_cnn` names no modality.
    """

    config: UtteranceConfig

    def __init__(self, modalities: Mapping[str, int], labels: int, config: UtteranceConfig) -> None:
        super().__init__(modalities, labels, config)
        self.check_outline(modalities, labels, config)
        standardized = modalities.items() if config.standardize else ()
        self.standardization = nn.ModuleDict({name: Standardization(size) for name, size in standardized})
        self.encoders = utterance_encoders(
            modalities,
            config.dim,
            text_cnn=config.text_modalities(modalities),
            pooling=config.pooling,
            channels=config.channels,
            dropout=config.text_dropout,
        )

    @property
    def outputs(self) -> Outputs:
        return CLASSES if self.config.outputs == "classes" else LABELS

    @classmethod
    def check_outline(cls, modalities: Mapping[str, int], labels: int, config: UtteranceConfig) -> None:
        super().check_outline(modalities, labels, config)
        config.text_modalities(modalities)

    @classmethod
    def check_data(cls, data: MultiModalData, config: UtteranceConfig) -> None:
        check_classes(data, config)

    def fit(self, split: Split) -> None:
        fit_standardization(self.standardization, split)

    def standardized(self, batch: Batch, name: str) -> Tensor:
        """(B, T, F): the features of a modality, as configured."""
        x_btf = batch.features[name]
        return self.standardization[name](x_btf) if self.config.standardize else x_btf

    def encode(self, batch: Batch, encoders: nn.ModuleDict | None = None) -> Tensor:
        """Embeddings (B, M, D) of the modalities, 0 where one is missing; by `encoders`, or those of the system."""
        encoders = self.encoders if encoders is None else encoders
        encoded = [encoder(self.standardized(batch, name), batch.lengths[name]) for name, encoder in encoders.items()]
        return torch.stack(encoded, dim=1)

    def present(self, batch: Batch) -> Tensor:
        """(B, M) bool: which modalities each sample has."""
        return torch.stack([batch.lengths[name] > 0 for name in self.modalities], dim=1)

    def labelled_loss(self, logits_bk: Tensor, labels_bk: Tensor, labelled_b: Tensor) -> Tensor:
        """`recognition_loss` of the samples that `labelled_b` (B,) bool says have labels; 0 where none has."""
        if not labelled_b.any():
            return logits_bk[:0].sum()
        return self.recognition_loss(logits_bk[labelled_b], labels_bk[labelled_b])


def check_classes(data: MultiModalData, config: UtteranceConfig, used_n: np.ndarray | None = None) -> None:
    """Check that each sample has exactly one label, where the system chooses one class.

    Args:
        data: all of its splits.
        config: of the system.
        used_n: (N,) bool, the training samples whose labels are used; None: all.

    Raises:
        DataError: one has not.
    """
    if config.outputs != "classes":
        return
    for name, split in data.splits.items():
        counts_n = split.labels.sum(axis=1)
        wrong_n = counts_n != 1
        if name == "train" and used_n is not None:
            wrong_n &= used_n
        if wrong_n.any():
            first = wrong_n.argmax()
            raise DataError(
                f"{name} labels: expected exactly one for each sample with outputs='classes'; "
                f"got {counts_n[first]} for sample {first} (outputs='labels' allows any number)"
            )

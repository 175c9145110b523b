"""Adversarial cross-culture training (the talk; Zhao et al., AVEC 2019): emotion yes, culture no.

Shape suffixes: b batch, m modalities, d width, c cultures, k labels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mmer_fast.data import Batch, DataError, MultiModalData
from mmer_fast.systems.adaptation.config import CrossCultureConfig
from mmer_fast.systems.adaptation.culture import UNKNOWN, CultureClassifier, culture_loss
from mmer_fast.systems.adaptation.presets import CROSS_CULTURE_PRESETS
from mmer_fast.systems.interface import Objective
from mmer_fast.systems.utterance import fusion
from mmer_fast.systems.utterance_system import UtteranceConfig, UtteranceSystem, check_classes


class CrossCulture(UtteranceSystem):
    """Encoders, fusion and classifier, with a culture classifier on the fused representation as an adversary.

    The loss is L_emotion + w L_culture; the gradient of the latter is reversed below its classifier.

    Args:
        modalities: name → feature size.
        labels: K.
        config: sizes and switches.

    Raises:
        ValueError: as `UtteranceSystem`.
    """

    config_class = CrossCultureConfig
    presets = CROSS_CULTURE_PRESETS
    loss_names = ("recognition", "culture")
    target_extras = ("culture",)
    config: CrossCultureConfig

    def __init__(self, modalities: Mapping[str, int], labels: int, config: CrossCultureConfig) -> None:
        super().__init__(modalities, labels, config)
        self.fusion = fusion(len(modalities) * config.dim, config.fused_dim, config.dropout)
        self.classifier = nn.Linear(config.fused_dim, labels)
        self.culture_classifier = CultureClassifier(
            config.fused_dim, config.cultures, config.fused_dim, config.reversal_scale
        )

    @classmethod
    def check_data(cls, data: MultiModalData, config: UtteranceConfig) -> None:
        """Refuse training data without cultures, or of which no label is used, and with classes other numbers of labels
        than one where they are used.

        Raises:
            DataError: saying what is missing.
        """
        assert isinstance(config, CrossCultureConfig)
        if config.labelled is None:
            super().check_data(data, config)
        culture_n = data.splits["train"].extras.get("culture")
        if culture_n is None:
            raise DataError(
                "train: expected the extra culture (train_extras_culture), an integer a sample; the data 'dialogues' "
                "has it"
            )
        outside = culture_n.dtype.kind not in "iu" or culture_n.ndim != 1
        if outside or culture_n.min() < UNKNOWN or culture_n.max() >= config.cultures:
            raise DataError(
                f"train extras culture: expected (N,) integers below cultures={config.cultures}, or {UNKNOWN} where "
                f"unknown; got {culture_n.dtype} of shape {culture_n.shape} from {culture_n.min()} to {culture_n.max()}"
            )
        if config.labelled is None:
            return
        used_n = np.isin(culture_n, config.labelled)
        if not used_n.any():
            raise DataError(
                f"train extras culture: expected a sample of labelled_cultures={config.labelled_cultures!r}; "
                f"got {', '.join(map(str, np.unique(culture_n)))}"
            )
        check_classes(data, config, used_n)

    def fused(self, batch: Batch) -> Tensor:
        """The representation (B, D) that both classifiers read."""
        return self.fusion(self.encode(batch).flatten(1))

    def logits(self, batch: Batch) -> Tensor:
        return self.classifier(self.fused(batch))

    def objective(self, batch: Batch) -> Objective:
        fused_bd = self.fused(batch)
        logits_bk = self.classifier(fused_bd)
        culture_b = batch.extras["culture"]
        recognition = self.labelled_loss(logits_bk, batch.labels, self._labelled(culture_b))
        culture = culture_loss(self.culture_classifier(fused_bd), culture_b)
        total = recognition + self.config.culture_weight * culture
        return Objective(total, torch.stack([recognition, culture]).detach(), logits_bk.detach())

    def _labelled(self, culture_b: Tensor) -> Tensor:
        """(B,) bool: whose labels are used."""
        cultures = self.config.labelled
        if cultures is None:
            return torch.ones_like(culture_b, dtype=torch.bool)
        return torch.isin(culture_b, culture_b.new_tensor(cultures))

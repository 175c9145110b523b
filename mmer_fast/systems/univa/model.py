"""UniVA: an encoder for each modality, their outputs side by side, one linear classifier."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mmer_fast.data import Batch, DataError, MultiModalData, Split
from mmer_fast.data.statistics import feature_statistics
from mmer_fast.models.dropout import Dropout
from mmer_fast.models.outputs import LABELS, Outputs
from mmer_fast.models.robmmr import check_outline
from mmer_fast.systems.interface import Objective, SystemModel
from mmer_fast.systems.univa.config import UniVAConfig
from mmer_fast.systems.univa.encoder import UnimodalEncoder
from mmer_fast.systems.univa.objective import LOSS_NAMES, VA, UniVAObjective, label_similarity
from mmer_fast.systems.univa.presets import PRESETS


class UniVA(SystemModel):
    """Zheng, Yu and Xia, ACM MM 2024. Logits are those of the concatenated H_m; losses in `UniVAObjective`.

    Args:
        modalities: modality → feature size.
        labels: K.
        config: sizes and switches.
        encoders: modality → a network of your own in the place of `UnimodalEncoder`: called with features (B, T, F) and
            lengths (B,), returns (B, `config.dim`).

    Raises:
        ValueError: no modality, a name that cannot name a submodule, other encoders than modalities, weights of other
            modalities, or emotions that are not the K labels.
    """

    config_class = UniVAConfig
    presets = PRESETS
    loss_names = LOSS_NAMES
    target_extras = (VA + "*",)

    def __init__(
        self,
        modalities: Mapping[str, int],
        labels: int,
        config: UniVAConfig,
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(modalities, labels, config)
        check_outline(modalities, labels)
        if encoders is None:
            encoders = {
                name: UnimodalEncoder(size, config.blocks_of(name), config) for name, size in modalities.items()
            }
        if set(encoders) != set(modalities):
            raise ValueError(f"encoders must be those of {', '.join(modalities)}, got {', '.join(encoders) or 'none'}")
        self.encoders = nn.ModuleDict({name: encoders[name] for name in modalities})
        self.classifier = nn.Linear(config.dim * len(modalities), labels)
        self.classifier_dropout = Dropout(config.classifier_dropout)
        self.losses = UniVAObjective(list(modalities), labels, config)

    @property
    def outputs(self) -> Outputs:
        """A softmax that all labels share, or a sigmoid each; either way the labels above a threshold."""
        return LABELS if self.config.recognition == "bce" else Outputs("softmax", "threshold")

    @property
    def training_extras(self) -> tuple[str, ...]:
        """The VA scores, where the contrastive loss is on."""
        return super().training_extras if self.config.contrast else ()

    @classmethod
    def check_outline(cls, modalities: Mapping[str, int], labels: int, config: UniVAConfig) -> None:
        super().check_outline(modalities, labels, config)
        for name in modalities:
            config.blocks_of(name)
        config.check_weights(modalities)
        if config.prior != "none":
            label_similarity(labels, config)

    @classmethod
    def check_inputs(cls, data: MultiModalData, config: UniVAConfig) -> None:
        """Refuse samples with more tokens than there are learned positions.

        Raises:
            DataError: naming the split and the modality, and the settings that take longer ones.
        """
        if config.positions != "learned":
            return
        for name, split in data.splits.items():
            for modality in data.modalities:
                longest = int(split.lengths[modality].max(initial=0))
                if longest > config.max_length:
                    raise DataError(
                        f"{name} {modality}: expected lengths of at most UniVAConfig.max_length={config.max_length}, "
                        f"the number of learned positions; got {longest}: raise max_length, or set positions to "
                        f"sinusoidal or none"
                    )

    @classmethod
    def check_data(cls, data: MultiModalData, config: UniVAConfig) -> None:
        """Refuse what `check_inputs` does, and data without VA scores, where the contrastive loss needs them, or with
        labels that the prior does not know.

        Raises:
            DataError: saying what is missing, and which data has it or which setting does without.
        """
        cls.check_inputs(data, config)
        if config.contrast:
            for modality in data.modalities:
                _check_scores(data.splits["train"], VA + modality)
        numbered = [f"label_{k}" for k in range(len(config.emotion_names))]
        if config.prior != "none" and data.label_names not in (config.emotion_names, numbered):
            raise DataError(
                f"label_names: expected those of UniVAConfig.emotions, {', '.join(config.emotion_names)}; got "
                f"{', '.join(data.label_names)}. Set emotions to the names of the labels joined by '+', with "
                f"emotion_va for names without NRC-VAD values, or prior to none"
            )

    def fit(self, split: Split) -> None:
        """Take the scales of the features and of the VA scores."""
        for name, encoder in self.encoders.items():
            if isinstance(encoder, UnimodalEncoder) and encoder.standardization is not None:
                encoder.standardization.fit(*feature_statistics(split.features[name], split.lengths[name]))
        self.losses.fit(split)

    def encode(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H_m: modality → (B, D), of features (B, T, F) and lengths (B,); a missing modality (length 0) has 0."""
        return {name: encoder(features[name], lengths[name]) for name, encoder in self.encoders.items()}

    def classify(self, hidden: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, K) of all H_m."""
        return self.classifier_dropout(self.classifier(torch.cat([hidden[name] for name in self.modalities], dim=1)))

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""
        return self.classify(self.encode(batch.features, batch.lengths))

    def recognition_loss(self, logits_nk: Tensor, labels_nk: Tensor) -> Tensor:
        """Scalar: `UniVAConfig.recognition`, without its factor."""
        return self.losses.recognition(logits_nk, labels_nk)

    def objective(self, batch: Batch) -> Objective:
        """`UniVAObjective` of a batch; with the contrastive loss it needs the extras va_<modality> (B, 2)."""
        hidden = self.encode(batch.features, batch.lengths)
        va = {name: batch.extras[VA + name] for name in self.modalities if VA + name in batch.extras}
        return self.losses(self.classify(hidden), batch.labels, hidden, va, batch.lengths)


def _check_scores(split: Split, extra: str) -> None:
    if extra not in split.extras:
        raise DataError(
            f"train extras: expected {extra}, valence and arousal of each sample, for the contrastive loss; got "
            f"{', '.join(split.extras) or 'none'}. The embedded data and UniVA's own files have them; contrast=false "
            f"does without"
        )
    values = split.extras[extra]
    if values.dtype.kind != "f" or values.shape != (len(split), 2) or not np.isfinite(values).all():
        raise DataError(
            f"train extras {extra}: expected finite floating numbers of shape ({len(split)}, 2); got {values.dtype} "
            f"of shape {values.shape}"
        )

"""M3ER: multiplicative multimodal emotion recognition (Mittal et al., AAAI 2020), after slides about it.

    features → standardised → modality check → proxies for what is ineffectual → memory fusion network → logits

The feature vector f_i of a sample is the mean over time of its standardised features. A proxy for f_i becomes a
sequence whose every step is the proxy: as long as the one it replaces, or as the longest effective one where the
modality is missing. Its mean over time is then the proxy, as it has to be, and nothing of the noise is left in it.

Shapes: B samples, T time steps, D features, M modalities, K labels, H the width of an LSTM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmer_fast.data import Batch, SequenceDataset, Split
from mmer_fast.models.dropout import Dropout
from mmer_fast.models.pooling import padded_means
from mmer_fast.models.robmmr import check_outline
from mmer_fast.models.standardization import Standardization, fit_standardization
from mmer_fast.systems.interface import Objective, Preset, SystemModel
from mmer_fast.systems.m3er.check import ModalityCheck
from mmer_fast.systems.m3er.config import M3ERConfig
from mmer_fast.systems.m3er.losses import multiplicative_loss
from mmer_fast.systems.m3er.memory import MemoryFusionNetwork, multiplicative_fusion
from mmer_fast.systems.m3er.presets import PRESETS
from mmer_fast.systems.m3er.proxy import ProxyVectors

FIT_BATCH = 256  # samples whose feature vectors are computed at a time


class M3EROutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: (B, K), of the network.
        modality_logits: (M, B, K), of each modality's LSTM by itself.
        used: (B, M) bool, the modalities that were read, proxies among them.
    """

    logits: Tensor
    modality_logits: Tensor
    used: Tensor


class M3ER(SystemModel):
    """Modality check, proxy feature vectors and a memory fusion network with multiplicative fusion.

    `fit` takes statistics, canonical correlations and the training samples' feature vectors into buffers.
    """

    config: M3ERConfig
    config_class: ClassVar[type] = M3ERConfig
    presets: ClassVar[Mapping[str, Preset]] = PRESETS
    loss_names: ClassVar[tuple[str, ...]] = ("recognition", "fusion")

    def __init__(self, modalities: Mapping[str, int], labels: int, config: M3ERConfig) -> None:
        check_outline(modalities, labels)
        super().__init__(modalities, labels, config)
        self.standardization = nn.ModuleDict({name: Standardization(size) for name, size in modalities.items()})
        self.check = ModalityCheck(
            modalities,
            components=config.components,
            tau=config.tau,
            rule=config.rule,
            ridge=config.cca_ridge,
            false_alarms=config.false_alarms,
        )
        self.proxies = ProxyVectors(modalities, neighbours=config.neighbours, ridge=config.proxy_ridge)
        self.network = MemoryFusionNetwork(modalities, config.hidden, config.memory, config.feedback)
        self.input_dropout = Dropout(config.input_dropout)
        self.dropout = Dropout(config.dropout)
        self.modality_classifiers = nn.ModuleDict({name: nn.Linear(config.hidden, labels) for name in modalities})
        self.head = nn.Linear(config.hidden + config.memory, config.head)
        self.classifier = nn.Linear(config.head, labels)

    @torch.no_grad()
    def fit(self, split: Split) -> None:
        """Fit standardisation, modality check and proxies to the training split."""
        fit_standardization(self.standardization, split)
        parts, present = [], []
        dataset = SequenceDataset(split)
        for start in range(0, len(dataset), FIT_BATCH):
            batch = dataset.__getitems__(range(start, min(start + FIT_BATCH, len(dataset))))
            batch = batch.to(self.classifier.weight.device)
            parts.append(self.vectors(self._standardized(batch.features), batch.lengths))
            present.append(self._present(batch.lengths))
        vectors = {name: torch.cat([part[name] for part in parts]).double() for name in self.modalities}
        present_nm = torch.cat(present)
        if self.config.check:
            self.check.fit(vectors, present_nm)
        if self.config.proxy:
            self.proxies.fit(vectors, self.check(vectors, present_nm) if self.config.check else present_nm)

    def vectors(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The feature vectors: modality → (B, D), of standardised features."""
        return {name: padded_means(features[name], lengths[name]) for name in self.modalities}

    @torch.no_grad()
    def judge(
        self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Which modalities are effective, and proxies for the others, as configured.

        Args:
            features: modality → (B, T, D), standardised.
            lengths: modality → (B,).

        Returns:
            I_e (B, M) bool; modality → proxy (B, D); and where there is a proxy, (B, M) bool.
        """
        vectors, present_bm = self.vectors(features, lengths), self._present(lengths)
        effective_bm = self.check(vectors, present_bm) if self.config.check else present_bm
        if self.config.proxy:
            return effective_bm, *self.proxies(vectors, effective_bm)
        return effective_bm, vectors, torch.zeros_like(effective_bm)

    def regenerate(
        self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features and lengths as they came where a modality is effective; elsewhere its proxy, or the length 0.

        Args:
            features: modality → (B, T, D), standardised.
            lengths: modality → (B,).
        """
        effective_bm, proxies, available_bm = self.judge(features, lengths)
        new_lengths = {name: lengths[name] * effective_bm[:, m] for m, name in enumerate(self.modalities)}
        if not bool(available_bm.any()):
            return dict(features), new_lengths
        longest_b = torch.stack(list(new_lengths.values())).amax(dim=0)
        new_features = {}
        for m, name in enumerate(self.modalities):
            replaced_b = available_bm[:, m]
            length_b = torch.where(lengths[name] > 0, lengths[name], longest_b)
            new_lengths[name] = torch.where(replaced_b, length_b, new_lengths[name])
            x_btd = F.pad(features[name], (0, 0, 0, max(0, int(new_lengths[name].max()) - features[name].shape[1])))
            new_features[name] = torch.where(replaced_b[:, None, None], proxies[name][:, None], x_btd)
        return new_features, new_lengths

    def forward(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> M3EROutput:
        """Features (B, T, D) up to their lengths (B,); padding may hold anything."""
        features = self._standardized(features)
        if self.config.in_training or not self.training:
            features, lengths = self.regenerate(features, lengths)
        h_mbh, u_bu = self.network({name: self.input_dropout(x_btd) for name, x_btd in features.items()}, lengths)
        classifiers = self.modality_classifiers.values()
        modality_logits = [layer(self.dropout(h_bh)) for layer, h_bh in zip(classifiers, h_mbh, strict=True)]
        read_bd = self.dropout(torch.cat([multiplicative_fusion(h_mbh), u_bu], dim=1))
        logits_bk = self.classifier(self.head(read_bd).relu())
        return M3EROutput(logits_bk, torch.stack(modality_logits), self._present(lengths))

    def logits(self, batch: Batch) -> Tensor:
        """(B, K) of the network."""
        return self(batch.features, batch.lengths).logits

    def objective(self, batch: Batch) -> Objective:
        """Cross-entropy of the logits + `fusion_weight` × the multiplicative loss, both means over samples and labels.

        (The slides sum over modalities, and say nothing of labels: a mean over them only scales.)
        """
        config, out = self.config, self(batch.features, batch.lengths)
        labels_bk = batch.labels.to(out.logits.dtype)
        recognition = self.recognition_loss(out.logits, labels_bk)
        fusion = multiplicative_loss(
            out.modality_logits,
            labels_bk,
            out.used,
            beta=config.beta,
            form=config.fusion,
            weight=config.modified_weight,
            detach_weights=config.detach_weights,
        ).mean()
        total = recognition + config.fusion_weight * fusion
        return Objective(total, torch.stack([recognition, fusion]).detach(), out.logits.detach())

    def _standardized(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: layer(features[name]) for name, layer in self.standardization.items()}

    def _present(self, lengths: Mapping[str, Tensor]) -> Tensor:
        """(B, M) bool."""
        return torch.stack([lengths[name] > 0 for name in self.modalities], dim=1)

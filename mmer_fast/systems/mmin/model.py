"""MMIN, the Missing Modality Imagination Network (Zhao, Li and Jin, ACL 2021).

One model for every combination of modalities. It is trained twice over: first the encoders of all modalities, with a
classifier of their own; then, from there on, what a frozen copy of these encoders (the teacher) makes of the missing
modalities has to be imagined from the others, and the codes of this imagination are classified.

Encoders read one modality each, so every sample is encoded once, and its conditions differ in the embeddings only.

Shape suffixes: b batch, c conditions, r rows (b c), m modalities, d width, k labels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmer_fast.data import Batch
from mmer_fast.systems.interface import Objective
from mmer_fast.systems.mmin.conditions import condition_masks, missing_conditions, unified
from mmer_fast.systems.mmin.config import MMINConfig
from mmer_fast.systems.mmin.imagination import Autoencoder, CascadeResidualAutoencoder, Imagination
from mmer_fast.systems.mmin.losses import imagination_loss
from mmer_fast.systems.mmin.presets import PRESETS
from mmer_fast.systems.utterance import perceptron
from mmer_fast.systems.utterance_system import UtteranceConfig, UtteranceSystem


class MMIN(UtteranceSystem):
    """Recognises emotions whatever modalities are there; a modality of length 0 is missing.

    What the configuration leaves out is not there: `teacher`, `imagination` and `joint_classifier` are then None.

    Args:
        modalities: name → feature size.
        labels: K.
        config: sizes and switches.

    Raises:
        ValueError: as `UtteranceSystem`, or for one modality only, which cannot be missing.
    """

    config_class = MMINConfig
    presets = PRESETS
    loss_names = ("recognition", "forward", "backward")
    config: MMINConfig
    conditions: Tensor
    imagining: Tensor

    def __init__(self, modalities: Mapping[str, int], labels: int, config: MMINConfig) -> None:
        super().__init__(modalities, labels, config)
        width = len(modalities) * config.dim
        self.classifier = perceptron(width, config.classifier_dim, labels, config.dropout)
        self.teacher: nn.ModuleDict | None = None
        self.imagination: Imagination | None = None
        self.joint_classifier: nn.Module | None = None
        if config.imagination != "none":
            self.teacher = copy.deepcopy(self.encoders).requires_grad_(False)
            forward_network = _imagination_network(width, config)
            self.imagination = Imagination(
                forward_network, _imagination_network(width, config) if config.cycle else None
            )
            self.joint_classifier = perceptron(forward_network.code_dim, config.classifier_dim, labels, config.dropout)
        trained = missing_conditions(list(modalities)) if "missing" in config.conditions else []
        trained += [tuple(modalities)] if "full" in config.conditions else []
        self.register_buffer("conditions", condition_masks(list(modalities), trained), persistent=False)
        self.register_buffer("imagining", torch.tensor(False))

    @classmethod
    def check_outline(cls, modalities: Mapping[str, int], labels: int, config: UtteranceConfig) -> None:
        super().check_outline(modalities, labels, config)
        assert isinstance(config, MMINConfig)
        if config.conditions != "full" and len(modalities) < 2:
            raise ValueError(f"modalities must be at least two for one to be missing, got {', '.join(modalities)}")

    @torch.no_grad()
    def start_epoch(self, epoch: int) -> None:
        """After the epochs of pretraining the encoders become the teacher, once: a resumed run has it already."""
        if self.teacher is None or self.imagining or epoch < self.config.pretrain_epochs:
            return
        for taught, own in zip(self.teacher.parameters(), self.encoders.parameters(), strict=True):
            taught.copy_(own)
        self.imagining.fill_(True)

    def train(self, mode: bool = True) -> MMIN:
        """The teacher stays as it is in evaluation, without dropout."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @property
    def pretraining(self) -> bool:
        return self.imagination is not None and not self.imagines

    @property
    def imagines(self) -> bool:
        """Whether pretraining is over and the codes of imagination are what is classified."""
        return self.imagination is not None and bool(self.imagining)

    def logits(self, batch: Batch) -> Tensor:
        """(B, K) from what is there of each sample."""
        return self._classify(self.embed(batch)[0].flatten(1))

    def objective(self, batch: Batch) -> Objective:
        """Recognition alone while pretraining and without imagination, else the joint loss L_cls + λ1 L_fwd + λ2 L_bwd.

        The logits are those with everything that is there.
        """
        h_bmd, absent_md = self.embed(batch)
        available_bcm = self._training_conditions(len(batch), h_bmd.device)
        h_rd = unified(h_bmd, available_bcm, absent_md)
        labels_rk = batch.labels.repeat_interleave(available_bcm.shape[1], dim=0)
        if self.imagines:
            parts = self._joint_losses(h_rd, labels_rk, self._imagination_target(batch, available_bcm))
        else:
            recognition = self.recognition_loss(self.classifier(h_rd), labels_rk)
            parts = F.pad(recognition[None], (0, 2))
        weights = parts.new_tensor([1.0, self.config.forward_weight, self.config.backward_weight])
        with torch.no_grad():
            logits_bk = self._classify(h_bmd.flatten(1))
        return Objective(parts @ weights, parts.detach(), logits_bk)

    def embed(self, batch: Batch, encoders: nn.ModuleDict | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings of the modalities.

        Args:
            batch: B samples.
            encoders: those of this model, or its teacher's; None: the former.

        Returns:
            (B, M, D), and the embedding of each modality where it is missing, (M, D).
        """
        encoders = self.encoders if encoders is None else encoders
        absent_md = self._absent(encoders)
        return torch.where(self.present(batch)[..., None], self.encode(batch, encoders), absent_md), absent_md

    def _absent(self, encoders: nn.ModuleDict) -> Tensor:
        """(M, D): the embeddings of modalities that are missing."""
        parameter = next(encoders.parameters())
        if self.config.missing == "embedding":
            return parameter.new_zeros(len(encoders), self.config.dim)
        one = torch.ones(1, dtype=torch.int64, device=parameter.device)
        zeros = {name: parameter.new_zeros(1, 1, size) for name, size in self.modalities.items()}
        return torch.cat([encoder(zeros[name], one) for name, encoder in encoders.items()])

    def _training_conditions(self, samples: int, device: torch.device) -> Tensor:
        """(B, C, M) bool: the modalities that each sample keeps, under each of the conditions of this step."""
        if self.pretraining:
            return torch.ones(samples, 1, len(self.modalities), dtype=torch.bool, device=device)
        if self.config.expansion == "drawn":
            drawn_b = torch.randint(len(self.conditions), (samples,), device=device)
            return self.conditions[drawn_b][:, None]
        return self.conditions.expand(samples, -1, -1)

    @torch.no_grad()
    def _imagination_target(self, batch: Batch, available_bcm: Tensor) -> Tensor:
        """(B C, M D): the teacher's embeddings of what a condition leaves out, beside those of missing modalities."""
        target_bmd, absent_md = self.embed(batch, self.teacher)
        return unified(target_bmd, ~available_bcm, absent_md)

    def _joint_losses(self, h_rd: Tensor, labels_rk: Tensor, target_rd: Tensor) -> Tensor:
        """(3,): L_cls, L_forward and L_backward, not weighted."""
        assert self.imagination is not None
        assert self.joint_classifier is not None
        config, imagined = self.config, self.imagination(h_rd)
        recognition = self.recognition_loss(self.joint_classifier(imagined.joint), labels_rk)
        forward = imagination_loss(target_rd, imagined.forward, config.reduction)
        backward = torch.zeros_like(forward)
        if imagined.backward is not None:
            available_rd = h_rd.detach() if config.detach_available else h_rd
            backward = imagination_loss(available_rd, imagined.backward, config.reduction)
        return torch.stack([recognition, forward, backward])

    def _classify(self, h_rd: Tensor) -> Tensor:
        if not self.imagines:
            return self.classifier(h_rd)
        assert self.imagination is not None
        assert self.joint_classifier is not None
        return self.joint_classifier(self.imagination.joint(h_rd))


def _imagination_network(width: int, config: MMINConfig) -> Autoencoder | CascadeResidualAutoencoder:
    sizes = (4 * config.code_dim, 2 * config.code_dim, config.code_dim)
    if config.imagination == "autoencoder":
        return Autoencoder(width, sizes)
    return CascadeResidualAutoencoder(width, sizes, config.blocks, config.transition)

"""Semi-supervised recognition with cross-modal distribution matching, after Liang, Li and Jin (ACM MM 2020).

The talk names the method and says no more: an utterance has one emotional state, which all modalities show, so their
embeddings should be distributed alike, with labels or without. The distances and the reconstruction here are ours.

Shape suffixes: b batch, t time, f features, m modalities, d width, k labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mmer_fast.data import Batch, DataError, MultiModalData, Split
from mmer_fast.models.pooling import padded_means
from mmer_fast.systems.adaptation.config import SemiSupervisedConfig
from mmer_fast.systems.adaptation.matching import cross_modal_matching, maximum_mean_discrepancy, moment_discrepancy
from mmer_fast.systems.adaptation.presets import SEMI_SUPERVISED_PRESETS
from mmer_fast.systems.interface import Objective
from mmer_fast.systems.utterance import fusion
from mmer_fast.systems.utterance_system import UtteranceConfig, UtteranceSystem, check_classes

DISTANCES: dict[str, Callable[..., Tensor]] = {"mmd": maximum_mean_discrepancy, "moments": moment_discrepancy}


class SemiSupervised(UtteranceSystem):
    """Encoders, a latent space that all modalities share, fusion and classifier; labels of some samples only.

    The loss is L_emotion of the labelled samples + w1 L_matching + w2 L_reconstruction of all of them.

    Args:
        modalities: name → feature size.
        labels: K.
        config: sizes and switches.

    Raises:
        ValueError: as `UtteranceSystem`.
    """

    config_class = SemiSupervisedConfig
    presets = SEMI_SUPERVISED_PRESETS
    loss_names = ("recognition", "matching", "reconstruction")
    target_extras = ("labelled",)
    config: SemiSupervisedConfig

    def __init__(self, modalities: Mapping[str, int], labels: int, config: SemiSupervisedConfig) -> None:
        super().__init__(modalities, labels, config)
        self.projections = nn.ModuleDict({name: nn.Linear(config.dim, config.latent_dim) for name in modalities})
        self.decoders = nn.ModuleDict({name: nn.Linear(config.latent_dim, size) for name, size in modalities.items()})
        self.fusion = fusion(len(modalities) * config.latent_dim, config.fused_dim, config.dropout)
        self.classifier = nn.Linear(config.fused_dim, labels)

    @classmethod
    def check_data(cls, data: MultiModalData, config: UtteranceConfig) -> None:
        labelled_n = data.splits["train"].extras.get("labelled")
        if labelled_n is None:
            raise DataError(
                "train: expected the extra labelled (train_extras_labelled), a bool a sample; hide_labels makes it"
            )
        if labelled_n.dtype != np.bool_ or labelled_n.ndim != 1 or not labelled_n.any():
            raise DataError(
                f"train extras labelled: expected (N,) bool with at least one True; "
                f"got {labelled_n.dtype} of shape {labelled_n.shape}"
            )
        check_classes(data, config, labelled_n)

    def latents(self, batch: Batch) -> Tensor:
        """Embeddings (B, M, D) in (-1, 1) in the space that modalities share, 0 where one is missing."""
        encoded_bmd = self.encode(batch)
        projected = [project(encoded_bmd[:, i]) for i, project in enumerate(self.projections.values())]
        return torch.stack(projected, dim=1).tanh() * self.present(batch)[..., None]

    def logits(self, batch: Batch) -> Tensor:
        return self._classify(self.latents(batch))

    def objective(self, batch: Batch) -> Objective:
        config, labelled_b = self.config, batch.extras["labelled"]
        z_bmd = self.latents(batch)
        logits_bk = self._classify(z_bmd)
        counted_bm = self.present(batch)
        if config.matched == "unlabelled":
            counted_bm = counted_bm & ~labelled_b[:, None]
        parts = torch.stack(
            [
                self.labelled_loss(logits_bk, batch.labels, labelled_b),
                cross_modal_matching(z_bmd, counted_bm, DISTANCES[config.matching]),
                self._reconstruction_loss(batch, z_bmd, counted_bm),
            ]
        )
        weights = parts.new_tensor([1.0, config.matching_weight, config.reconstruction_weight])
        return Objective(parts @ weights, parts.detach(), logits_bk.detach())

    def _classify(self, z_bmd: Tensor) -> Tensor:
        return self.classifier(self.fusion(z_bmd.flatten(1)))

    def _reconstruction_loss(self, batch: Batch, z_bmd: Tensor, counted_bm: Tensor) -> Tensor:
        """The mean over modalities, and the samples that count, of the mean squared error of the average unit."""
        losses = []
        for i, (name, decode) in enumerate(self.decoders.items()):
            average_bf = padded_means(self.standardized(batch, name), batch.lengths[name])
            errors_b = (decode(z_bmd[:, i]) - average_bf).square().mean(dim=1)
            counted_b = counted_bm[:, i]
            losses.append(torch.where(counted_b, errors_b, 0.0).sum() / counted_b.sum().clamp(min=1))
        return torch.stack(losses).mean()


def hide_labels(data: MultiModalData, share: float, seed: int = 0) -> MultiModalData:
    """The same data with the extra `labelled`: of the training split only a share is, drawn at random.

    The labels themselves stay where they are, for measuring; `SemiSupervised` does not look at them.

    Args:
        data: arrays are shared, not copied.
        share: in (0, 1], of the training samples, rounded; at least one stays labelled.
        seed: of the draw.

    Raises:
        DataError: `share` lies outside its range.
    """
    if not 0 < share <= 1:
        raise DataError(f"share: expected a value in (0, 1]; got {share}")
    splits = {}
    for name, split in data.splits.items():
        labelled_n = np.ones(len(split), dtype=np.bool_)
        if name == "train":
            order_n = np.random.default_rng(seed).permutation(len(split))
            labelled_n[order_n[max(1, round(share * len(split))) :]] = False
        splits[name] = Split(split.features, split.lengths, split.labels, {**split.extras, "labelled": labelled_n})
    note = f"labels of {share:.0%} of the training samples are used"
    return MultiModalData(splits, data.label_names, data.modalities, data.source, [*data.notes, note])

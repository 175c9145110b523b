"""What the networks of this package share: standardised tokens without padding, and binary cross-entropy.

Shape suffixes: b samples, n tokens of a modality of all samples, t time, f features, d width, k labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.data import Batch, Split
from mmer_fast.models.attention import Spans
from mmer_fast.models.dropout import Dropout
from mmer_fast.models.losses import binary_cross_entropy
from mmer_fast.models.robmmr import check_batch
from mmer_fast.models.standardization import Standardization, fit_standardization
from mmer_fast.systems.interface import Objective, SystemModel


class Tokens(NamedTuple):
    """The units of a modality of all samples end to end: `values` (N, D), and where they are."""

    values: Tensor
    layout: mf.PackedLayout

    @property
    def spans(self) -> Spans:
        return Spans.of(self.layout)


class Baseline(SystemModel):
    """A network that reads standardised features and is trained on binary cross-entropy.

    Args:
        modalities: modality → feature size, at least one.
        labels: K, at least 1.
        config: of `config_class`.

    Raises:
        ValueError: as `RobMMR` does.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("recognition",)

    def __init__(self, modalities: Mapping[str, int], labels: int, config: Any) -> None:
        self.check_outline(modalities, labels, config)
        super().__init__(modalities, labels, config)
        self.standardization = nn.ModuleDict({name: Standardization(size) for name, size in modalities.items()})

    def fit(self, split: Split) -> None:
        """Take mean and standard deviation of every feature from the training split."""
        fit_standardization(self.standardization, split)

    def tokens(self, batch: Batch) -> dict[str, Tokens]:
        """Modality → its units (N, F), standardised. What the padding holds does not matter.

        Raises:
            ValueError: the batch lacks a modality, or it has another shape.
        """
        check_batch(self.modalities, batch.features, batch.lengths)
        found = {}
        for name in self.modalities:
            layout = mf.packed_layout(batch.lengths[name])
            found[name] = Tokens(self.standardization[name](mf.pack(batch.features[name], layout)), layout)
        return found

    def objective(self, batch: Batch) -> Objective:
        """Binary cross-entropy, the mean over samples and labels."""
        logits_bk = self.logits(batch)
        loss = binary_cross_entropy(logits_bk, batch.labels.to(logits_bk.dtype))
        return Objective(loss, loss.detach()[None], logits_bk.detach())


def embedding(features: int, dim: int, dropout: float) -> nn.Sequential:
    """From units (N, F) to (N, D): linear, LayerNorm, dropout."""
    return nn.Sequential(nn.Linear(features, dim), nn.LayerNorm(dim), Dropout(dropout))


def first_tokens(x_nd: Tensor, spans: Spans) -> Tensor:
    """The first token (B, D) of each sample, 0 where it has none."""
    return _tokens_at(x_nd, spans, spans.cu_seqlens[:-1])


def last_tokens(x_nd: Tensor, spans: Spans) -> Tensor:
    """The last token (B, D) of each sample, 0 where it has none."""
    return _tokens_at(x_nd, spans, spans.cu_seqlens[1:] - 1)


def _tokens_at(x_nd: Tensor, spans: Spans, place_b: Tensor) -> Tensor:
    with_zero_nd = torch.cat([x_nd, x_nd.new_zeros(1, x_nd.shape[1])])
    place_b = torch.where(spans.lengths > 0, place_b.long(), x_nd.shape[0])
    return with_zero_nd.index_select(0, place_b)

"""TAILOR, versatile multi-modal learning for multi-label emotion recognition (Zhang et al., AAAI 2022).

Unimodal encoders; for each unit a common and a private representation, refined by a modality discriminator; a
hierarchical cross-modal encoder that starts from what is common and takes in one modality's private units after the
other; a decoder with a query a label.

The published facts give these parts, sizes and the weights of the losses; `docs/systems/baselines.md` says what was
chosen.

Shape suffixes: b samples, n tokens, t time, m modalities, d width, k labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.data import Batch
from mmer_fast.models.attention import Spans
from mmer_fast.models.config import check_types
from mmer_fast.models.initialization import xavier_uniform_
from mmer_fast.models.losses import binary_cross_entropy
from mmer_fast.models.pooling import token_means
from mmer_fast.models.robmmr import LabelClassifiers
from mmer_fast.models.transformer import Decoder, Encoder, FeedForward
from mmer_fast.systems.baselines.base import Baseline, Tokens, embedding
from mmer_fast.systems.baselines.checks import require_heads, require_rates, require_sizes, require_weights
from mmer_fast.systems.baselines.refinement import ModalityDiscriminator, adversarial_loss, orthogonal_loss
from mmer_fast.systems.interface import Objective, Preset


@dataclass(frozen=True)
class TAILORConfig:
    """Sizes, losses and switches of `TAILOR`; the defaults are those of the published code where it is known.

    Attributes:
        dim: width d of the hidden states.
        ffn_dim: inner width of the feed-forward layers.
        heads: attention heads; must divide `dim`.
        language: the modality whose encoder has `language_layers`; there need not be any of this name.
        language_layers, unimodal_layers: of the encoder of the language, and of every other modality.
        cross_layers: of each stage of the cross-modal encoder.
        decoder_layers: of the label decoder.
        dropout: on embeddings, residual branches, inside the feed-forward layers and on attention weights.
        fusion: "hierarchical": what is common first, then the private units of one modality after the other, a stage
            each; "joint": all in one stage.
        adversarial_weight, orthogonal_weight, common_weight: of the losses beside L; 0 leaves one out.
        reversal_scale: factor of the reversed gradient of the adversarial loss.
    """

    dim: int = 256
    ffn_dim: int = 1024
    heads: int = 8
    language: str = "text"
    language_layers: int = 6
    unimodal_layers: int = 4
    cross_layers: int = 3
    decoder_layers: int = 1
    dropout: float = 0.3
    fusion: Literal["hierarchical", "joint"] = "hierarchical"
    adversarial_weight: float = 0.01
    orthogonal_weight: float = 5e-6
    common_weight: float = 0.5
    reversal_scale: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        require_sizes(self, "dim", "ffn_dim", "language_layers", "unimodal_layers", "cross_layers", "decoder_layers")
        require_heads(self)
        require_rates(self, "dropout")
        require_weights(self, "adversarial_weight", "orthogonal_weight", "common_weight", "reversal_scale")


@dataclass(frozen=True)
class Refined:
    """What the refinement makes of a batch: modality → units (N, D), common and private."""

    common: dict[str, Tokens]
    private: dict[str, Tokens]


class TAILOR(Baseline):
    """Encode, refine, fuse, decode.

    H^m = encoder^m(x^m);  C^m = E_c(H^m);  P^m = E_m(H^m)
    F_0 = [C^1; ...; C^M];  F_j = cross_j([F_(j-1); P^j]);  y = classifiers(decoder(F_M))
    loss = BCE(y) + w_a L_adv(C, P) + w_o Σ_m L_orth(C^m, P^m) + w_c BCE(common classifier(mean of C))
    """

    config_class: ClassVar[type] = TAILORConfig
    presets: ClassVar[Mapping[str, Preset]] = {
        "compact": Preset(
            model={
                "dim": 64,
                "ffn_dim": 128,
                "heads": 4,
                "language_layers": 1,
                "unimodal_layers": 1,
                "cross_layers": 1,
                "dropout": 0.1,
            },
            train={"learning_rate": 1.5e-3, "clip_norm": 1.0, "epochs": 12},
        ),
        "authors": Preset(train={"learning_rate": 5e-5, "batch_size": 64, "epochs": 20, "threshold": 0.35}),
    }
    loss_names: ClassVar[tuple[str, ...]] = ("recognition", "adversarial", "orthogonal", "common")

    config: TAILORConfig

    def __init__(self, modalities: Mapping[str, int], labels: int, config: TAILORConfig) -> None:
        super().__init__(modalities, labels, config)
        dim = config.dim
        self.embeddings = nn.ModuleDict(
            {name: embedding(size, dim, config.dropout) for name, size in modalities.items()}
        )
        self.encoders = nn.ModuleDict({name: self._encoder(self._unimodal_layers(name)) for name in modalities})
        self.common = self._refinement()
        self.private = nn.ModuleDict({name: self._refinement() for name in modalities})
        self.discriminator = ModalityDiscriminator(dim, len(modalities))
        self.common_classifier = nn.Linear(dim, labels)
        self.kinds = nn.Parameter(torch.empty(1 + len(modalities), dim))
        stages = len(modalities) if config.fusion == "hierarchical" else 1
        self.cross = nn.ModuleList(self._encoder(config.cross_layers) for _ in range(stages))
        stack = config.ffn_dim, config.heads, config.dropout, config.dropout
        self.decoder = Decoder(labels, config.decoder_layers, dim, *stack)
        self.classifiers = LabelClassifiers(labels, dim)
        xavier_uniform_(self)

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""
        return self.decode(*self.fuse(self.refine(batch)))

    def objective(self, batch: Batch) -> Objective:
        """The weighted sum of the class's loss; parts of weight 0 are not computed."""
        refined = self.refine(batch)
        logits_bk = self.decode(*self.fuse(refined))
        labels_bk = batch.labels.to(logits_bk.dtype)
        weights = (1.0, self.config.adversarial_weight, self.config.orthogonal_weight, self.config.common_weight)
        losses = (
            lambda: binary_cross_entropy(logits_bk, labels_bk),
            lambda: self._adversarial(refined),
            lambda: self._orthogonal(refined),
            lambda: binary_cross_entropy(self._common_logits(refined), labels_bk),
        )
        parts = torch.stack(
            [loss() if weight > 0 else logits_bk.new_zeros(()) for weight, loss in zip(weights, losses, strict=True)]
        )
        return Objective((parts * parts.new_tensor(weights)).sum(), parts.detach(), logits_bk.detach())

    def refine(self, batch: Batch) -> Refined:
        """Common and private representations of every unit."""
        refined = Refined({}, {})
        for name, x in self.tokens(batch).items():
            hidden_nd = self.encoders[name](self.embeddings[name](x.values), x.spans)
            refined.common[name] = Tokens(self.common(hidden_nd), x.layout)
            refined.private[name] = Tokens(self.private[name](hidden_nd), x.layout)
        return refined

    def fuse(self, refined: Refined) -> tuple[Tensor, Spans]:
        """The fused units (N, D) of each sample, and where they are."""
        common_kind_d, *private_kinds = self.kinds
        fused_nd, layout = _join([*refined.common.values()])
        fused_nd = fused_nd + common_kind_d
        private = [
            Tokens(x.values + kind_d, x.layout)
            for x, kind_d in zip(refined.private.values(), private_kinds, strict=True)
        ]
        stages = [[x] for x in private] if self.config.fusion == "hierarchical" else [private]
        for encoder, added in zip(self.cross, stages, strict=True):
            fused_nd, layout = _join([Tokens(fused_nd, layout), *added])
            fused_nd = encoder(fused_nd, Spans.of(layout))
        return fused_nd, Spans.of(layout)

    def decode(self, fused_nd: Tensor, spans: Spans) -> Tensor:
        """Logits (B, K): one query a label over the fused units."""
        return self.classifiers(self.decoder(fused_nd, spans))

    def _adversarial(self, refined: Refined) -> Tensor:
        common_bmd, private_bmd = (
            torch.stack([token_means(x.values, x.spans) for x in kind.values()], dim=1)
            for kind in (refined.common, refined.private)
        )
        present_bm = torch.stack([x.layout.lengths > 0 for x in refined.common.values()], dim=1)
        return adversarial_loss(self.discriminator, common_bmd, private_bmd, present_bm, self.config.reversal_scale)

    def _orthogonal(self, refined: Refined) -> Tensor:
        pairs = zip(refined.common.values(), refined.private.values(), strict=True)
        return torch.stack([orthogonal_loss(_padded(c), _padded(p), c.layout.lengths) for c, p in pairs]).sum()

    def _common_logits(self, refined: Refined) -> Tensor:
        common_nd, layout = _join([*refined.common.values()])
        return self.common_classifier(token_means(common_nd, Spans.of(layout)))

    def _unimodal_layers(self, name: str) -> int:
        return self.config.language_layers if name == self.config.language else self.config.unimodal_layers

    def _refinement(self) -> nn.Sequential:
        """E_c or E_m. The LayerNorm keeps units at one length: they could shrink to please the orthogonal loss."""
        return nn.Sequential(
            FeedForward(self.config.dim, self.config.dim, self.config.dropout), nn.LayerNorm(self.config.dim)
        )

    def _encoder(self, layers: int) -> Encoder:
        config = self.config
        return Encoder(layers, config.dim, config.ffn_dim, config.heads, config.dropout, config.dropout)


def _join(parts: list[Tokens]) -> Tokens:
    """The tokens of each sample of all parts, one part after the other."""
    layout = mf.packed_layout(*(part.layout.lengths for part in parts))
    return Tokens(layout.join([part.values for part in parts]), layout)


def _padded(x: Tokens) -> Tensor:
    padded_btd = mf.unpack(x.values, x.layout)
    assert isinstance(padded_btd, Tensor)
    return padded_btd

"""RobMMR (Ge et al., WWW 2023): unimodal encoders E^x, multi-modal encoder E^m, emotion decoder D, mask
networks M^x.

Modalities are a mapping name → feature size, in a fixed order; nothing here knows how many there are or what
they mean. Every part is callable alone (`encode`, `fuse`, `decode`, `temporal_masks`), so that a training
algorithm can reuse intermediate results; `forward` is their plain composition.

Between input and output every tensor holds the valid tokens of all samples end to end (`mmer_fast.ops.packing`):
no linear layer, LayerNorm, feed-forward or attention computes padding.

Shape suffixes: b batch, t time of a modality, n tokens of a modality or of all of them, f features, d width, k labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.data import Batch, Split
from mmer_fast.models.attention import Spans
from mmer_fast.models.config import RobMMRConfig
from mmer_fast.models.dropout import Dropout
from mmer_fast.models.initialization import xavier_uniform_
from mmer_fast.models.layout import BatchLayout
from mmer_fast.models.lstm import LSTMEncoder
from mmer_fast.models.masking import MaskNetwork, random_masks, temporal_masks
from mmer_fast.models.network import Network
from mmer_fast.models.pooling import token_means
from mmer_fast.models.standardization import Standardization, fit_standardization
from mmer_fast.models.transformer import Decoder, Encoder, sinusoidal_positions
from mmer_fast.ops.lengths import length_mask


@dataclass(frozen=True)
class Encodings:
    """Outputs of the unimodal encoders.

    Attributes:
        hidden: modality → (N, D), its tokens end to end.
        layout: where they are.
    """

    hidden: dict[str, Tensor]
    layout: BatchLayout

    def padded(self, name: str, values_n: Tensor | None = None) -> Tensor:
        """`hidden`, or other values (N, ...) of the tokens of a modality, as (B, T, ...) with 0 in the padding."""
        values_n = self.hidden[name] if values_n is None else values_n
        padded = mf.unpack(values_n, self.layout.alone[name], self.layout.steps[name])
        assert isinstance(padded, Tensor)
        return padded


@dataclass(frozen=True)
class RobMMROutput:
    """Result of a forward pass: `logits` (B, K), and the unimodal `encodings` they come from."""

    logits: Tensor
    encodings: Encodings


class LabelClassifiers(nn.Module):
    """K linear classifiers, the k-th reading the k-th decoder output."""

    def __init__(self, labels: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(labels, dim))
        self.bias = nn.Parameter(torch.zeros(labels))

    def forward(self, x_bkd: Tensor) -> Tensor:
        return (x_bkd * self.weight).sum(dim=-1) + self.bias


class RobMMR(Network):
    """Multi-modal multi-label emotion recognition network with adversarial temporal masks.

    What the configuration leaves out is not there: `multimodal_encoder` and `decoder` are then None, `mask_networks`
    is empty.

    Args:
        modalities: name → feature size, at least one; the order is that of the concatenation along time.
        labels: number of labels K, at least 1.
        config: sizes and switches.

    Raises:
        ValueError: no modality, a name that cannot name a submodule, a feature size or the number of labels
            below 1.
    """

    def __init__(self, modalities: Mapping[str, int], labels: int, config: RobMMRConfig) -> None:
        check_outline(modalities, labels)
        super().__init__(modalities, labels, config)
        stack = (config.dim, config.ffn_dim, config.heads, config.dropout, config.attention_dropout)
        self.embeddings = nn.ModuleDict({name: _embedding(size, config) for name, size in modalities.items()})
        self.unimodal_encoders = nn.ModuleDict({name: _encoder(config.unimodal_blocks, config) for name in modalities})
        fused = config.fusion == "encoder"
        self.multimodal_encoder = _encoder(config.multimodal_blocks, config) if fused else None
        self.decoder = Decoder(labels, config.decoder_blocks, *stack) if config.head == "decoder" else None
        self.classifier: nn.Module = (
            LabelClassifiers(labels, config.dim)
            if config.classifier == "per_label"
            else nn.Sequential(nn.Linear(config.dim, 1), nn.Flatten(-2))
        )
        self.classifier_dropout = Dropout(config.classifier_dropout)
        standardized = modalities.items() if config.standardize else ()
        self.standardization = nn.ModuleDict({name: Standardization(size) for name, size in standardized})
        # Drawn whether needed or not: with and without mask networks, a seed gives the rest the same weights.
        self.mask_networks = nn.ModuleDict({name: MaskNetwork(config) for name in modalities})
        xavier_uniform_(self)
        if config.mask_source != "network":
            self.mask_networks = nn.ModuleDict()

    def forward(
        self,
        features: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        offsets: Mapping[str, Tensor] | None = None,
        layout: BatchLayout | None = None,
    ) -> RobMMROutput:
        """Label logits of a batch: D(E^m([E^x(x ∘ m)])), Algorithm 1 lines 4 and 10.

        Args:
            features: modality → (B, T, F), floating; values beyond the length are ignored, NaN included.
            lengths: modality → (B,) integer, 0 to T; 0 is a missing modality.
            masks: modality → (B, T), the multiplier m of Eq. 10; None multiplies by nothing.
            offsets: modality → (N, D), floating, added to what `embeddings` makes of its N tokens, after any mask;
                the tokens that count, sample after sample (`zero_offsets` has the shapes). None adds nothing.
            layout: that of these features and lengths, where it is known; else it is made here.

        Raises:
            ValueError: a modality is absent or has another shape than announced.
        """
        encodings = self.encode(features, lengths, masks, offsets, layout)
        return RobMMROutput(self.decode(*self.fuse(encodings)), encodings)

    def logits(self, batch: Batch) -> Tensor:
        """Those of `forward`."""
        return self(batch.features, batch.lengths, layout=self.layout_of(batch)).logits  # type: ignore[no-any-return]

    def fit(self, split: Split) -> None:
        """Take μ and σ of the features, where they are standardised."""
        fit_standardization(self.standardization, split)

    def layout(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> BatchLayout:
        """Where the tokens of a batch are, on the device of its features.

        Args:
            features: as in `forward`.
            lengths: as in `forward`, or on the CPU: then nothing waits for the device of the features.

        Raises:
            ValueError: a modality is absent or has another shape than announced.
        """
        check_batch(self.modalities, features, lengths)
        steps = {name: self._steps(features[name]) for name in self.modalities}
        counted = {name: lengths[name] for name in self.modalities}
        if not self.config.padding_mask:
            counted = {name: torch.full_like(lengths_b, steps[name]) for name, lengths_b in counted.items()}
        return BatchLayout.of(counted, steps).to(next(iter(features.values())).device)

    def layout_of(self, batch: Batch) -> BatchLayout:
        """That of a batch, from its lengths on the CPU."""
        return self.layout(batch.features, batch.host_lengths)

    def encode(
        self,
        features: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        offsets: Mapping[str, Tensor] | None = None,
        layout: BatchLayout | None = None,
    ) -> Encodings:
        """Unimodal encodings H^x = E^x(x ∘ m); arguments as in `forward`."""
        check_batch(self.modalities, features, lengths)
        layout = self.layout(features, lengths) if layout is None else layout
        hidden = {}
        for name in self.modalities:
            x_btf, alone = features[name], layout.alone[name]
            x_btf = self.standardization[name](x_btf) if self.config.standardize else x_btf
            x_btf = x_btf if self.config.padding_mask else _zero_padded(x_btf, lengths[name], layout.steps[name])
            mask_n = None
            if masks is not None:
                mask_n = mf.pack(_fit(masks[name], layout.steps[name]), alone)
            offset_nd = None if offsets is None else self._offset(name, offsets, alone)
            hidden[name] = self._encode_one(name, mf.pack(x_btf, alone), alone, mask_n, offset_nd)
        return Encodings(hidden, layout)

    def zero_offsets(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Offsets of 0 for `forward` with these arguments: modality → (N, D), in the dtype of the features.

        N is the sum of the lengths; where padding counts (`padding_mask` False), B times the padded length. Reads the
        lengths, which on CUDA waits for the device.
        """
        check_batch(self.modalities, features, lengths)
        zeros = {}
        for name in self.modalities:
            x_btf = features[name]
            padded = x_btf.shape[0] * self._steps(x_btf)
            tokens = int(lengths[name].sum()) if self.config.padding_mask else padded
            zeros[name] = x_btf.new_zeros(tokens, self.config.dim)
        return zeros

    def fuse(self, encodings: Encodings) -> tuple[Tensor, Spans]:
        """H^m = E^m([H^x]): the tokens (N, D) of all modalities of each sample, and where each sample's are.

        [H^x] itself where there is no E^m.
        """
        joint = encodings.layout.joint
        hidden_nd = joint.join([encodings.hidden[name] for name in self.modalities])
        spans = Spans.of(joint)
        return hidden_nd if self.multimodal_encoder is None else self.multimodal_encoder(hidden_nd, spans), spans

    def decode(self, memory_nd: Tensor, memory: Spans) -> Tensor:
        """Logits (B, K) from H^m (N, D): D with its label queries, or the mean where there is no D; the classifiers."""
        if self.decoder is None:
            read_bkd = token_means(memory_nd, memory)[:, None]  # the same for all labels
        else:
            read_bkd = self.decoder(memory_nd, memory)
        return self.classifier_dropout(self.classifier(read_bkd))

    def temporal_masks(self, encodings: Encodings, batch_group: Any = None) -> dict[str, Tensor]:
        """The adversarial masks m^x (B, T) of Eq. 6-7 from clean encodings; their gradient is reversed (Eq. 11).

        Where `mask_source` is "random" they are drawn, and nothing of the encodings counts but the lengths.

        Args:
            encodings: from `encode`.
            batch_group: process group whose ranks have a part of the batch each; None: all of it is here.
        """
        layout = encodings.layout
        if self.config.mask_source == "random":
            dtype = next(iter(encodings.hidden.values())).dtype
            return random_masks(layout.lengths, layout.steps, dtype, self.config)
        scores, lengths = self.mask_scores(encodings), layout.lengths
        if not layout.fillers:
            return temporal_masks(scores, lengths, self.config, batch_group)
        scores = {name: scores_bt[: -layout.fillers] for name, scores_bt in scores.items()}
        lengths = {name: lengths_b[: -layout.fillers] for name, lengths_b in lengths.items()}
        masks = temporal_masks(scores, lengths, self.config, batch_group)
        return {name: F.pad(mask_bt, (0, 0, 0, layout.fillers), value=1.0) for name, mask_bt in masks.items()}

    def mask_scores(self, encodings: Encodings) -> dict[str, Tensor]:
        """Scores (B, T) of the mask networks from clean encodings, 0 in the padding; empty where there are none."""
        return {
            name: encodings.padded(name, network(encodings.hidden[name]))
            for name, network in self.mask_networks.items()
        }

    def _encode_one(
        self, name: str, x_nf: Tensor, layout: mf.PackedLayout, mask_n: Tensor | None, offset_nd: Tensor | None
    ) -> Tensor:
        masks_features = self.config.masked_input == "features"
        if mask_n is not None and masks_features:
            x_nf = x_nf * mask_n[:, None]
        x_nd = self.embeddings[name](x_nf)
        if mask_n is not None and not masks_features:
            x_nd = x_nd * mask_n[:, None]
        if offset_nd is not None:
            x_nd = x_nd + offset_nd
        if self.config.positions == "sinusoidal":
            x_nd = x_nd + sinusoidal_positions(layout.time, x_nd.shape[1], x_nd.dtype)
        return self.unimodal_encoders[name](x_nd, Spans.of(layout))

    def _steps(self, x_btf: Tensor) -> int:
        """T of a modality: where padding counts as configured, else that of its features."""
        return x_btf.shape[1] if self.config.padding_mask else max(self.config.padded_length or 1, x_btf.shape[1])

    def _offset(self, name: str, offsets: Mapping[str, Tensor], layout: mf.PackedLayout) -> Tensor:
        if name not in offsets:
            raise ValueError(f"offsets must hold modality {name!r}; got {sorted(offsets)}")
        expected = (layout.total, self.config.dim)
        if offsets[name].shape != expected:
            raise ValueError(f"offsets[{name!r}] must have shape {expected}, got {tuple(offsets[name].shape)}")
        return offsets[name]


def check_outline(modalities: Mapping[str, int], labels: int) -> None:
    """Check what a `RobMMR` is to be built for, without building it.

    Raises:
        ValueError: as `RobMMR` does.
    """
    if not modalities or any(size < 1 for size in modalities.values()):
        raise ValueError(f"modalities must map at least one name to a size of at least 1, got {dict(modalities)}")
    for name in modalities:
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"modality {name!r} cannot name a submodule (it must not be empty, hold a dot or be an attribute of "
                "torch.nn.ModuleDict); rename it"
            )
    if labels < 1:
        raise ValueError(f"labels must be at least 1, got {labels}")


def check_batch(modalities: Mapping[str, int], features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> None:
    """Check that a batch is one of these modalities (name → feature size), without reading a value of it.

    Raises:
        ValueError: a modality is absent or has another shape than announced.
    """
    for name, size in modalities.items():
        if name not in features or name not in lengths:
            raise ValueError(f"features and lengths must hold modality {name!r}; got {sorted(features)}")
        x_btf = features[name]
        if x_btf.dim() != 3 or x_btf.shape[-1] != size:
            raise ValueError(f"features[{name!r}] must have shape (B, T, {size}), got {tuple(x_btf.shape)}")
        if lengths[name].shape != x_btf.shape[:1]:
            raise ValueError(f"lengths[{name!r}] must have shape ({x_btf.shape[0]},), got {tuple(lengths[name].shape)}")


def _encoder(blocks: int, config: RobMMRConfig) -> Encoder | LSTMEncoder:
    if config.encoder == "lstm":
        return LSTMEncoder(blocks, config.dim, config.dropout)
    return Encoder(blocks, config.dim, config.ffn_dim, config.heads, config.dropout, config.attention_dropout)


def _embedding(features: int, config: RobMMRConfig) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, config.dim), nn.LayerNorm(config.dim), Dropout(config.dropout))


def _zero_padded(x_btf: Tensor, lengths_b: Tensor, steps: int) -> Tensor:
    """Zero beyond the lengths, and as many steps."""
    x_btf = x_btf.masked_fill(~length_mask(lengths_b, x_btf.shape[1])[..., None], 0.0)
    missing = steps - x_btf.shape[1]
    return F.pad(x_btf, (0, 0, 0, missing)) if missing else x_btf


def _fit(mask_bt: Tensor, length: int) -> Tensor:
    """Pad a mask to `length` units with zeros."""
    return F.pad(mask_bt, (0, length - mask_bt.shape[1])) if mask_bt.shape[1] < length else mask_bt

"""HHMPN, a heterogeneous hierarchical message passing network (Zhang et al., AAAI 2021).

Units of all modalities exchange messages first. Then every label, a node with an embedding of its own, takes messages
from the units of each modality (feature to label), weighs the modalities (modality to label), and exchanges messages
with the labels that it occurs with (label to label), layer after layer. A label's logit is the inner product of its
final state with its embedding.

The published facts give the three kinds of messages, sizes and the label graph; how a message is computed is attention
here, and `docs/systems/baselines.md` says what else was chosen.

Shape suffixes: b samples, n tokens, m modalities, k labels, q label nodes of all samples, d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.data import Batch, Split
from mmer_fast.models.attention import MultiHeadAttention, Spans
from mmer_fast.models.config import check_types
from mmer_fast.models.dropout import Dropout
from mmer_fast.models.initialization import xavier_uniform_
from mmer_fast.models.transformer import Encoder, FeedForward
from mmer_fast.nn import MultiheadAttention
from mmer_fast.systems.baselines.base import Baseline, Tokens, embedding
from mmer_fast.systems.baselines.checks import require, require_heads, require_rates, require_sizes
from mmer_fast.systems.baselines.label_graph import label_graph
from mmer_fast.systems.interface import Preset


@dataclass(frozen=True)
class HHMPNConfig:
    """Sizes and switches of `HHMPN`; the defaults are those of the published code where it is known.

    Attributes:
        dim: width d of units and labels.
        ffn_dim: inner width of the feed-forward layers.
        heads: attention heads; must divide `dim`.
        feature_layers: layers of messages between units.
        label_layers: layers of messages to and between labels.
        dropout: on embeddings, residual branches, inside the feed-forward layers and on attention weights.
        label_messages: messages between labels; False leaves them out.
        graph: who exchanges them: labels that occur together ("cooccurrence"), or all ("complete").
        graph_threshold: the affinity from which on two labels are neighbours (`label_graph`).
        modality_weights: how a label combines the messages of the modalities: by "attention", or by their "mean".
    """

    dim: int = 512
    ffn_dim: int = 1024
    heads: int = 8
    feature_layers: int = 3
    label_layers: int = 3
    dropout: float = 0.2
    label_messages: bool = True
    graph: Literal["cooccurrence", "complete"] = "cooccurrence"
    graph_threshold: float = 0.2
    modality_weights: Literal["attention", "mean"] = "attention"

    def __post_init__(self) -> None:
        check_types(self)
        require_sizes(self, "dim", "ffn_dim", "feature_layers", "label_layers")
        require_heads(self)
        require_rates(self, "dropout")
        require(self, "graph_threshold", 0 <= self.graph_threshold <= 1, "in [0, 1]")


class ModalityMessages(nn.Module):
    """Messages of units to labels, modality by modality, and the weights of the modalities (modality to label).

        a_m = attention_m(u, H^m, H^m);   e_m = vᵀ tanh(W u + V a_m);   message = Σ_m softmax_m(e) a_m

    over the modalities that the sample has; 0 where it has none.
    """

    def __init__(self, modalities: Mapping[str, int], config: HHMPNConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {name: MultiHeadAttention(config.dim, config.heads, config.dropout) for name in modalities}
        )
        self.scorer = _ModalityScorer(config.dim) if config.modality_weights == "attention" else None

    def forward(self, labels_qd: Tensor, labels: Spans, features: Mapping[str, Tokens]) -> Tensor:
        """Of the labels' states (Q, D) and the units of each modality; returns messages (Q, D)."""
        read = [self.attention[name](labels_qd, x.values, labels, x.spans) for name, x in features.items()]
        read_qmd = torch.stack(read, dim=1)
        present_bm = torch.stack([x.layout.lengths > 0 for x in features.values()], dim=1)
        present_qm = present_bm.repeat_interleave(labels.longest, dim=0)
        if self.scorer is None:
            scores_qm = read_qmd.new_zeros(present_qm.shape)
        else:
            scores_qm = self.scorer(labels_qd, read_qmd)
        weights_qm = scores_qm.masked_fill(~present_qm, -torch.inf).softmax(dim=1)
        weights_qm = torch.where(present_qm, weights_qm, 0.0)  # of a sample without any modality they are NaN
        return (weights_qm[..., None] * read_qmd).sum(dim=1)


class _ModalityScorer(nn.Module):
    """Additive attention of a label over the messages of the modalities."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.label = nn.Linear(dim, dim)
        self.message = nn.Linear(dim, dim, bias=False)
        self.score = nn.Linear(dim, 1, bias=False)

    def forward(self, labels_qd: Tensor, read_qmd: Tensor) -> Tensor:
        hidden_qmd = torch.tanh(self.label(labels_qd)[:, None] + self.message(read_qmd))
        return self.score(hidden_qmd).squeeze(-1)


class LabelLayer(nn.Module):
    """Messages of units and modalities to labels, between labels, and feed-forward; each with residual and LayerNorm.

    Args:
        modalities: whose units the labels read.
        config: sizes and switches.
    """

    def __init__(self, modalities: Mapping[str, int], config: HHMPNConfig) -> None:
        super().__init__()
        self.messages = ModalityMessages(modalities, config)
        self.messages_norm = nn.LayerNorm(config.dim)
        self.between = (
            MultiheadAttention(config.dim, config.heads, config.dropout, batch_first=True)
            if config.label_messages
            else None
        )
        self.between_norm = nn.LayerNorm(config.dim) if config.label_messages else None
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, config.dropout)
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, labels_bkd: Tensor, features: Mapping[str, Tokens], graph_kk: Tensor) -> Tensor:
        """New states (B, K, D) of the labels; `graph_kk` (K, K) bool says who hears whom."""
        samples, labels = labels_bkd.shape[:2]
        spans = Spans.equal(samples, labels, labels_bkd.device)
        read_qd = self.messages(labels_bkd.flatten(0, 1), spans, features)
        labels_bkd = self.messages_norm(labels_bkd + self.dropout(read_qd.unflatten(0, (samples, labels))))
        if self.between is not None and self.between_norm is not None:
            heard_bkd, _ = self.between(labels_bkd, labels_bkd, labels_bkd, need_weights=False, attn_mask=~graph_kk)
            labels_bkd = self.between_norm(labels_bkd + self.dropout(heard_bkd))
        return self.feed_forward_norm(labels_bkd + self.dropout(self._feed_forward(labels_bkd)))

    def _feed_forward(self, x_bkd: Tensor) -> Tensor:
        return self.feed_forward(x_bkd.flatten(0, 1)).unflatten(0, x_bkd.shape[:2])


class HHMPN(Baseline):
    """Units to units, units and modalities to labels, labels to labels; logits y_k = u_k · e_k + b_k.

    The embeddings e (K, D) are the states that the labels begin with, and read out what they end with (tied).
    """

    config_class: ClassVar[type] = HHMPNConfig
    presets: ClassVar[Mapping[str, Preset]] = {
        "compact": Preset(
            model={"dim": 64, "ffn_dim": 128, "heads": 4, "feature_layers": 2, "label_layers": 2, "dropout": 0.1},
            train={"learning_rate": 1.5e-3, "clip_norm": 1.0, "epochs": 12},
        ),
        "authors": Preset(
            train={
                "learning_rate": 1e-5,
                "weight_decay": 0.0,
                "batch_size": 64,
                "accumulation": 8,
                "epochs": 50,
                "selection": "micro_f1",
            }
        ),
    }

    config: HHMPNConfig
    graph: Tensor

    def __init__(self, modalities: Mapping[str, int], labels: int, config: HHMPNConfig) -> None:
        super().__init__(modalities, labels, config)
        self.embeddings = nn.ModuleDict(
            {name: embedding(size, config.dim, config.dropout) for name, size in modalities.items()}
        )
        self.modality_embedding = nn.Parameter(torch.empty(len(modalities), config.dim))
        sizes = config.dim, config.ffn_dim, config.heads, config.dropout, config.dropout
        self.encoder = Encoder(config.feature_layers, *sizes)
        self.label_layers = nn.ModuleList(LabelLayer(modalities, config) for _ in range(config.label_layers))
        self.label_embedding = nn.Parameter(torch.empty(labels, config.dim))
        self.label_bias = nn.Parameter(torch.zeros(labels))
        self.register_buffer("graph", torch.ones(labels, labels, dtype=torch.bool))
        xavier_uniform_(self)

    def fit(self, split: Split) -> None:
        """Take the scale of the features and the label graph from the training split."""
        super().fit(split)
        if self.config.graph == "cooccurrence":
            self.graph.copy_(label_graph(torch.tensor(split.labels), self.config.graph_threshold))

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""
        features = self.encode(batch)
        labels_bkd = self.label_embedding.expand(len(batch.labels), -1, -1)
        for layer in self.label_layers:
            labels_bkd = layer(labels_bkd, features, self.graph)
        return (labels_bkd * self.label_embedding).sum(dim=-1) + self.label_bias

    def encode(self, batch: Batch) -> dict[str, Tokens]:
        """Modality → its units (N, D), after the messages between the units of all modalities of a sample."""
        inputs = self.tokens(batch)
        embedded = [
            self.embeddings[name](x.values) + kind_d
            for (name, x), kind_d in zip(inputs.items(), self.modality_embedding, strict=True)
        ]
        joint = mf.packed_layout(*(x.layout.lengths for x in inputs.values()))
        parts = joint.separate(self.encoder(joint.join(embedded), Spans.of(joint)))
        return {name: Tokens(part, x.layout) for (name, x), part in zip(inputs.items(), parts, strict=True)}

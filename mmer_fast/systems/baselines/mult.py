"""MulT, the Multimodal Transformer (Tsai et al., ACL 2019), with a multi-label classifier.

Every modality is updated by every other one: a stack of levels in which its units attend to the *input* units of the
other, across different lengths and without alignment. What a modality has taken from all others is put side by side and
goes through self-attention; the last unit of each modality is what the classifier reads.

Shape suffixes: b samples, n tokens of a modality, m tokens of the one that is read, t and s their padded time, d width,
k labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.data import Batch, DataError, MultiModalData
from mmer_fast.models.config import check_types
from mmer_fast.models.dropout import Dropout
from mmer_fast.models.transformer import FeedForward, sinusoidal_positions
from mmer_fast.nn import MultiheadAttention
from mmer_fast.systems.baselines.base import Baseline, Tokens, last_tokens
from mmer_fast.systems.baselines.checks import require, require_heads, require_rates, require_sizes
from mmer_fast.systems.interface import Preset


@dataclass(frozen=True)
class MulTConfig:
    """Sizes and switches of `MulT`; the defaults are those of the published code.

    Attributes:
        dim: width d of every modality, even.
        heads: attention heads; must divide `dim`.
        levels: of each cross-modal stack, and layers of each self-attention stack.
        mask: "future": a unit i attends to the units j <= i + |L2 - L1|, with the two lengths of the sample; "none".
        self_attention: a stack of self-attention on what each modality has taken from the others.
        language: the modality on which, where it is read and in its own self-attention, `attention_dropout` acts; there
            need not be any of this name.
        attention_dropout: on attention weights over the language.
        other_attention_dropout: on attention weights over other modalities.
        relu_dropout: inside the feed-forward layers.
        residual_dropout: on the residual branches.
        embedding_dropout: on the embeddings.
        output_dropout: inside the classifier.
    """

    dim: int = 30
    heads: int = 5
    levels: int = 5
    mask: Literal["future", "none"] = "future"
    self_attention: bool = True
    language: str = "text"
    attention_dropout: float = 0.1
    other_attention_dropout: float = 0.0
    relu_dropout: float = 0.1
    residual_dropout: float = 0.1
    embedding_dropout: float = 0.25
    output_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        require_sizes(self, "dim", "levels")
        require_heads(self)
        require(self, "dim", self.dim % 2 == 0, "even")
        require_rates(self, "attention_dropout", "other_attention_dropout", "relu_dropout", "residual_dropout")
        require_rates(self, "embedding_dropout", "output_dropout")


class Level(nn.Module):
    """Pre-norm attention of a modality to another, or to itself, and feed-forward.

        x <- x + dropout(attention(LN(x), LN'(c), LN'(c)));   x <- x + dropout(FFN(LN''(x)))

    Args:
        dim: width of both modalities.
        attention_dropout: on the attention weights.
        config: the rest.
    """

    def __init__(self, dim: int, attention_dropout: float, config: MulTConfig) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim)
        self.context_norm = nn.LayerNorm(dim)
        self.attention = MultiheadAttention(dim, config.heads, attention_dropout)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, 4 * dim, config.relu_dropout)
        self.dropout = Dropout(config.residual_dropout)

    def forward(self, x_nd: Tensor, layout: mf.PackedLayout, context: Tokens, bias: Tensor | None) -> Tensor:
        """Update tokens (N, D) by the `context` (M, D) of the same samples; `bias` (B, 1, T, S) as in attention."""
        context_md = self.context_norm(context.values)
        read_nd = self.attention.forward_packed(
            self.query_norm(x_nd), context_md, context_md, layout, context.layout, bias=bias
        )
        x_nd = x_nd + self.dropout(read_nd)
        return x_nd + self.dropout(self.feed_forward(self.feed_forward_norm(x_nd)))


class LevelStack(nn.Module):
    """√d x plus sinusoidal positions, dropout, `Level`s, LayerNorm.

    With a `context` the levels all read its embedding; without one each reads what the level before has made.
    """

    def __init__(self, dim: int, attention_dropout: float, config: MulTConfig) -> None:
        super().__init__()
        self.masked = config.mask == "future"
        self.levels = nn.ModuleList(Level(dim, attention_dropout, config) for _ in range(config.levels))
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(config.embedding_dropout)

    def forward(self, x: Tokens, context: Tokens | None = None) -> Tensor:
        """Tokens (N, D), of the same samples as the context (M, D); returns (N, D)."""
        read_layout = x.layout if context is None else context.layout
        bias = future_bias(x.layout, read_layout) if self.masked else None
        memory = None if context is None else Tokens(self._embed(context), context.layout)
        x_nd = self._embed(x)
        for level in self.levels:
            x_nd = level(x_nd, x.layout, Tokens(x_nd, x.layout) if memory is None else memory, bias)
        return self.norm(x_nd)

    def _embed(self, x: Tokens) -> Tensor:
        dim = x.values.shape[1]
        return self.dropout(math.sqrt(dim) * x.values + sinusoidal_positions(x.layout.time, dim, x.values.dtype))


class MulT(Baseline):
    """Cross-modal streams, self-attention, the last unit of each modality, a classifier.

    With X^m = embedding(x^m) (a convolution over one unit), for every modality m and every other one o:

        Z^(o→m) = CrossModal(X^m, X^o);   h^m = last(SelfAttention([Z^(o→m)]_o));   y = classifier([h^m]_m)

    A modality that a sample lacks changes no other and ends with 0.

    Raises:
        ValueError: fewer than two modalities.
    """

    config_class: ClassVar[type] = MulTConfig
    presets: ClassVar[Mapping[str, Preset]] = {
        "compact": Preset(
            model={"levels": 2, "embedding_dropout": 0.1},
            train={"learning_rate": 2e-3, "clip_norm": 0.8, "epochs": 12},
        ),
        "authors": Preset(
            train={"learning_rate": 1e-3, "weight_decay": 0.0, "batch_size": 24, "clip_norm": 0.8, "epochs": 40}
        ),
    }

    config: MulTConfig

    def __init__(self, modalities: Mapping[str, int], labels: int, config: MulTConfig) -> None:
        super().__init__(modalities, labels, config)
        dim, width = config.dim, config.dim * (len(modalities) - 1)
        self.embeddings = nn.ModuleDict({name: nn.Linear(size, dim) for name, size in modalities.items()})
        self.cross = nn.ModuleDict(
            {
                name: nn.ModuleDict({other: self._stack(dim, other) for other in modalities if other != name})
                for name in modalities
            }
        )
        collected = modalities if config.self_attention else ()
        self.self_attention = nn.ModuleDict({name: self._stack(width, name) for name in collected})
        self.classifier = _Classifier(width * len(modalities), labels, config.output_dropout)

    @classmethod
    def check_outline(cls, modalities: Mapping[str, int], labels: int, config: Any) -> None:
        super().check_outline(modalities, labels, config)
        if len(modalities) < 2:
            raise ValueError(f"modalities must be at least two for MulT, got {', '.join(modalities)}")

    @classmethod
    def check_data(cls, data: MultiModalData, config: Any) -> None:
        """Refuse data of one modality.

        Raises:
            DataError: naming it.
        """
        if len(data.modalities) < 2:
            raise DataError(
                f"{data.source}: MulT needs at least two modalities, which attend to each other; "
                f"got {', '.join(data.modalities)}"
            )

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""
        inputs = {name: Tokens(self.embeddings[name](x.values), x.layout) for name, x in self.tokens(batch).items()}
        return self.classifier(torch.cat([self._summary(name, inputs) for name in self.modalities], dim=1))

    def _summary(self, name: str, inputs: Mapping[str, Tokens]) -> Tensor:
        """h^m, (B, (M - 1) D)."""
        x = inputs[name]
        streams = self.cross[name]
        assert isinstance(streams, nn.ModuleDict)
        collected_nd = torch.cat([stack(x, inputs[other]) for other, stack in streams.items()], dim=1)
        if self.config.self_attention:
            collected_nd = self.self_attention[name](Tokens(collected_nd, x.layout))
        return last_tokens(collected_nd, x.spans)

    def _stack(self, dim: int, read: str) -> LevelStack:
        over_language = read == self.config.language
        rate = self.config.attention_dropout if over_language else self.config.other_attention_dropout
        return LevelStack(dim, rate, self.config)


class _Classifier(nn.Module):
    """Linear, ReLU, dropout, linear, a residual connection around them; then a linear layer for all labels."""

    def __init__(self, dim: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.feed_forward = FeedForward(dim, dim, dropout)
        self.out = nn.Linear(dim, labels)

    def forward(self, x_bd: Tensor) -> Tensor:
        return self.out(x_bd + self.feed_forward(x_bd))


def future_bias(queries: mf.PackedLayout, keys: mf.PackedLayout) -> Tensor:
    """The mask triu(1 + |L2 - L1|) as a bias (B, 1, T, S): -inf where j > i + |L2 - L1|, 0 elsewhere.

    T and S are the longest of the queries and of the keys, L1 and L2 the two lengths of each sample: a padded batch has
    no say in it.
    """
    reach_b = (keys.lengths - queries.lengths).abs()
    place_t = torch.arange(queries.max_seqlen, device=reach_b.device)
    place_s = torch.arange(keys.max_seqlen, device=reach_b.device)
    hidden_bts = place_s > place_t[:, None] + reach_b[:, None, None]
    return torch.zeros(hidden_bts.shape, device=reach_b.device).masked_fill(hidden_bts, -torch.inf).unsqueeze(1)

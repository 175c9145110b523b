"""An LSTM a modality, and a linear classifier over what they end with: the plainest network over sequences.

Shape suffixes: b samples, n tokens, d width, k labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmer_fast.data import Batch
from mmer_fast.models.attention import Spans
from mmer_fast.models.config import check_types
from mmer_fast.models.dropout import Dropout
from mmer_fast.models.lstm import LSTMEncoder
from mmer_fast.models.pooling import token_means
from mmer_fast.systems.baselines.base import Baseline, embedding, first_tokens, last_tokens
from mmer_fast.systems.baselines.checks import require, require_rates, require_sizes
from mmer_fast.systems.interface import Preset


@dataclass(frozen=True)
class LSTMConfig:
    """Sizes of `LSTM`.

    Attributes:
        dim: width of a modality's LSTM, half of it each way; even.
        layers: LSTMs on top of each other, for each modality.
        summary: what the classifier reads of each modality: its "last" states (of the forward LSTM after the last unit,
            of the backward one after the first), or the "mean" of the outputs of all units.
        dropout: on the embeddings, between the layers and on the summaries.
    """

    dim: int = 128
    layers: int = 1
    summary: Literal["last", "mean"] = "mean"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        require_sizes(self, "dim", "layers")
        require(self, "dim", self.dim % 2 == 0, "even")
        require_rates(self, "dropout")


class LSTM(Baseline):
    """Bidirectional LSTMs, one a modality; their summaries side by side; one linear layer for all labels.

        y = W [s^1; ...; s^M] + b,   s^m = summary(LSTM^m(embedding(x^m)))

    A modality that a sample lacks has the summary 0.
    """

    config_class: ClassVar[type] = LSTMConfig
    presets: ClassVar[Mapping[str, Preset]] = {
        "compact": Preset(train={"learning_rate": 2e-3, "clip_norm": 1.0, "epochs": 10}),
        "authors": Preset(
            model={"dim": 512, "layers": 4},
            train={"learning_rate": 5e-5, "epochs": 10, "batch_size": 64},
        ),
    }

    config: LSTMConfig

    def __init__(self, modalities: Mapping[str, int], labels: int, config: LSTMConfig) -> None:
        super().__init__(modalities, labels, config)
        self.embeddings = nn.ModuleDict(
            {name: embedding(size, config.dim, config.dropout) for name, size in modalities.items()}
        )
        self.encoders = nn.ModuleDict(
            {name: LSTMEncoder(config.layers, config.dim, config.dropout) for name in modalities}
        )
        self.dropout = Dropout(config.dropout)
        self.classifier = nn.Linear(config.dim * len(modalities), labels)

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""
        summaries = []
        for name, (x_nf, layout) in self.tokens(batch).items():
            spans = Spans.of(layout)
            hidden_nd = self.encoders[name](self.embeddings[name](x_nf), spans)
            summaries.append(self._summary(hidden_nd, spans))
        return self.classifier(self.dropout(torch.cat(summaries, dim=1)))

    def _summary(self, hidden_nd: Tensor, spans: Spans) -> Tensor:
        """(B, D) of the outputs (N, D): their mean, or the states that both directions end with."""
        if self.config.summary == "mean":
            return token_means(hidden_nd, spans)
        half = hidden_nd.shape[1] // 2
        return torch.cat([last_tokens(hidden_nd[:, :half], spans), first_tokens(hidden_nd[:, half:], spans)], dim=1)

"""From the sequence of a modality to one vector a sample: UniVA's unimodal encoders.

Shape suffixes: b batch, t time, n tokens of all samples end to end, f features, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.models.attention import Spans
from mmer_fast.models.dropout import Dropout
from mmer_fast.models.lstm import LSTMEncoder
from mmer_fast.models.pooling import token_means
from mmer_fast.models.standardization import Standardization
from mmer_fast.models.transformer import sinusoidal_positions
from mmer_fast.nn import TransformerEncoder, TransformerEncoderLayer
from mmer_fast.ops.lengths import length_mask
from mmer_fast.systems.univa.config import UniVAConfig


class AdditivePooling(nn.Module):
    """Attention with one learned query q, additive as in Bahdanau et al. 2015:

        e_n = vᵀ tanh(P x_n + Q q) + c,    H = Σ_n softmax(e)_n x_n    over the tokens n of a sample

    Args:
        dim: width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(dim))
        self.of_tokens = nn.Linear(dim, dim)
        self.of_query = nn.Linear(dim, dim)
        self.score = nn.Linear(dim, 1)

    def forward(self, x_nd: Tensor, layout: mf.PackedLayout) -> Tensor:
        """Tokens (N, D) of all samples to (B, D); 0 where a sample has none."""
        scores_n = self.score(torch.tanh(self.of_tokens(x_nd) + self.of_query(self.query))).squeeze(-1)
        scores_bt = mf.unpack(scores_n.float() if scores_n.dtype != torch.float64 else scores_n, layout)
        assert isinstance(scores_bt, Tensor)
        padding_bt = ~length_mask(layout.lengths, scores_bt.shape[1])
        weights_bt = scores_bt.masked_fill(padding_bt, torch.finfo(scores_bt.dtype).min).softmax(dim=1)
        weighted_nd = mf.pack(weights_bt, layout)[:, None] * x_nd
        return torch.segment_reduce(weighted_nd, "sum", lengths=layout.lengths, axis=0, unsafe=True, initial=0)


class UnimodalEncoder(nn.Module):
    """H_m: linear layer, positions, Transformer or LSTM, pooling. Padding is never computed.

    Args:
        features: feature size F.
        blocks: of the Transformer, or layers of the LSTM; with 0 there is none.
        config: everything else.
    """

    def __init__(self, features: int, blocks: int, config: UniVAConfig) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.standardization = Standardization(features) if config.standardize else None
        self.embedding = nn.Sequential(nn.Linear(features, config.dim), Dropout(config.dropout))
        self.positions = nn.Embedding(config.max_length, config.dim) if config.positions == "learned" else None
        self.sinusoidal = config.positions == "sinusoidal"
        self.encoder = _encoder(blocks, config)
        self.pooling = AdditivePooling(config.dim) if config.pooling == "additive" else None

    def forward(self, x_btf: Tensor, lengths_b: Tensor) -> Tensor:
        """H_m (B, D) of features (B, T, F) with lengths (B,), 0 to T; 0 where the length is 0.

        Raises:
            ValueError: a sample has more tokens than there are learned positions.
        """
        layout = mf.packed_layout(lengths_b)
        x_nf = mf.pack(x_btf, layout)
        x_nf = x_nf if self.standardization is None else self.standardization(x_nf)
        x_nd = self.embedding(x_nf)
        x_nd = x_nd + self._position(layout, x_nd) if self.positions is not None or self.sinusoidal else x_nd
        if isinstance(self.encoder, LSTMEncoder):
            x_nd = self.encoder(x_nd, Spans.of(layout))
        elif self.encoder is not None:
            x_nd = self.encoder.forward_packed(x_nd, layout)
        return token_means(x_nd, Spans.of(layout)) if self.pooling is None else self.pooling(x_nd, layout)

    def _position(self, layout: mf.PackedLayout, x_nd: Tensor) -> Tensor:
        if self.positions is None:
            return sinusoidal_positions(layout.time, x_nd.shape[1], x_nd.dtype)
        if layout.max_seqlen > self.max_length:
            raise ValueError(
                f"lengths must be at most UniVAConfig.max_length={self.max_length} with learned positions, "
                f"got {layout.max_seqlen}"
            )
        return self.positions(layout.time)


def _encoder(blocks: int, config: UniVAConfig) -> TransformerEncoder | LSTMEncoder | None:
    if blocks == 0:
        return None
    if config.encoder == "lstm":
        return LSTMEncoder(blocks, config.dim, config.dropout)
    layer = TransformerEncoderLayer(config.dim, config.heads, config.ffn_dim, config.dropout, config.activation)
    layer.self_attn.dropout = config.attention_dropout
    return TransformerEncoder(layer, blocks)

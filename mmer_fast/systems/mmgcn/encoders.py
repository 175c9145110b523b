"""From features to one representation an utterance, of each modality.

Shape suffixes: b utterances of a batch, t steps, f features, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmer_fast.models.lstm import LSTMEncoder
from mmer_fast.systems.mmgcn.layout import DialogueLayout


class UtteranceEncoder(nn.Module):
    """A linear layer, and LSTMs over the utterances of each dialogue, forwards and backwards, half the width each.

    Published: LSTMs for text, the linear layer alone for audio and video. An utterance that the modality lacks is left
    out of the sequence: its neighbours follow each other.

    Args:
        features: F.
        dim: width D; even with LSTMs.
        layers: LSTMs on top of each other, or 0.
        dropout: between them, in training.
    """

    def __init__(self, features: int, dim: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(features, dim)
        self.lstm = LSTMEncoder(layers, dim, dropout) if layers else None

    def forward(self, x_bf: Tensor, present_b: Tensor, layout: DialogueLayout) -> Tensor:
        """(B, F) of the utterances, of which `present_b` (B,) bool are there, to (B, D), 0 for the others."""
        hidden_bd: Tensor = self.linear(x_bf)
        if self.lstm is None:
            return torch.where(present_b[:, None], hidden_bd, 0.0)
        index_n, spans = layout.encoded(present_b)
        encoded_nd = self.lstm(hidden_bd.index_select(0, index_n), spans)
        return encoded_nd.new_zeros(len(x_bf), encoded_nd.shape[1]).index_copy(0, index_n, encoded_nd)

"""A stack of LSTMs in the place of a Transformer encoder: RobMMR's ablation "LSTM for Transformer".

It works on the tokens of all samples end to end, as `mmer_fast.models.transformer.Encoder` does: they are put in the
order of `torch.nn.utils.rnn.PackedSequence` (first all samples' first tokens, then their second ones, ...), in which no
padding exists and an empty sample has no place.

Shape suffixes: n tokens of all samples, b samples, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mmer_fast.models.attention import Spans


class LSTMEncoder(nn.Module):
    """LSTMs over each sample's tokens, forwards and backwards, half the width each.

    In both directions, since a Transformer encoder sees the whole sequence from every token too; the two halves side by
    side have its width.

    The recurrence runs in the dtype of the parameters under autocast as well: it would carry the rounding of bfloat16
    from token to token.

    Args:
        layers: LSTMs on top of each other.
        dim: width of inputs and outputs, even.
        dropout: between the layers, in training.
    """

    def __init__(self, layers: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, dim // 2, layers, dropout=dropout if layers > 1 else 0.0, bidirectional=True)

    def forward(self, x_nd: Tensor, spans: Spans) -> Tensor:
        """Encode the tokens (N, D) of all samples; returns (N, D) in the dtype of the parameters."""
        x_nd = x_nd.to(next(self.lstm.parameters()).dtype)
        if x_nd.shape[0] == 0:  # the parameters get a gradient of 0, as those of other layers do, not none at all
            return x_nd + torch.stack([parameter.sum() for parameter in self.lstm.parameters()]).sum()
        order_n, batch_sizes = _packed_order(spans)
        with torch.autocast(x_nd.device.type, enabled=False):
            hidden, _ = self.lstm(PackedSequence(x_nd.index_select(0, order_n), batch_sizes))
        return hidden.data.index_select(0, order_n.argsort())


def _packed_order(spans: Spans) -> tuple[Tensor, Tensor]:
    """Where the tokens of a `PackedSequence` come from, (N,), and how many samples reach each time, int64 on the CPU.

    N must not be 0. Reads the lengths, which on CUDA waits for the device.
    """
    sample_n, time_n = spans.places()
    rank_b = spans.lengths.argsort(descending=True, stable=True).argsort()
    order_n = (time_n * len(rank_b) + rank_b[sample_n]).argsort()
    return order_n, time_n.bincount().cpu()

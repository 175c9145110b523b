"""From a sequence of units to one vector, and from vectors to logits: parts of the systems that work on utterances.

A sample's vector depends on its own units alone, neither on padding nor on the other samples of the batch.

Shape suffixes: b batch, t time, f features, d width, c channels, w windows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmer_fast.models.dropout import Dropout
from mmer_fast.ops.lengths import length_mask

KERNEL_SIZES = (3, 4, 5)


class UtteranceLSTM(nn.Module):
    """One LSTM forwards in time; its hidden states are pooled to one vector.

    Padding stands behind the units, so the recurrence meets it when all states that count are there already. It runs in
    the dtype of the parameters under autocast as well: it would carry the rounding of bfloat16 from unit to unit.

    Args:
        features: F.
        dim: width D of the hidden state.
        pooling: "max" over time, or the "last" state.
    """

    def __init__(self, features: int, dim: int, pooling: Literal["max", "last"] = "max") -> None:
        super().__init__()
        self.pooling = pooling
        self.lstm = nn.LSTM(features, dim, batch_first=True)

    def forward(self, x_btf: Tensor, lengths_b: Tensor) -> Tensor:
        """Encode (B, T, F) floating with (B,) integer lengths; (B, D), 0 where the length is 0."""
        valid_bt1 = length_mask(lengths_b, x_btf.shape[1])[..., None]
        x_btf = x_btf.masked_fill(~valid_bt1, 0.0).to(next(self.lstm.parameters()).dtype)
        with torch.autocast(x_btf.device.type, enabled=False):
            hidden_btd, _ = self.lstm(x_btf)
        if self.pooling == "max":
            pooled_bd = hidden_btd.masked_fill(~valid_bt1, -torch.inf).amax(dim=1)
        else:
            last_b = (lengths_b.long() - 1).clamp(min=0)
            pooled_bd = hidden_btd[torch.arange(len(last_b), device=last_b.device), last_b]
        return pooled_bd.masked_fill(lengths_b[:, None] == 0, 0.0)


class TextCNN(nn.Module):
    """Convolutions over time, the maximum of each feature map, a linear layer and a ReLU (Kim, 2014).

    A sample shorter than a kernel is filled up with zeros to one window.

    Args:
        features: F.
        dim: width D of the result.
        channels: feature maps C of each kernel size.
        kernel_sizes: units that a window has.
        dropout: on the maxima.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        channels: int = 128,
        kernel_sizes: Sequence[int] = KERNEL_SIZES,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.kernel_sizes = tuple(kernel_sizes)
        self.convolutions = nn.ModuleList(nn.Conv1d(features, channels, size) for size in self.kernel_sizes)
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(channels * len(self.kernel_sizes), dim)

    def forward(self, x_btf: Tensor, lengths_b: Tensor) -> Tensor:
        """Encode (B, T, F) floating with (B,) integer lengths; (B, D), 0 where the length is 0."""
        steps = x_btf.shape[1]
        x_btf = x_btf.masked_fill(~length_mask(lengths_b, steps)[..., None], 0.0)
        x_bft = F.pad(x_btf.transpose(1, 2), (0, max(0, max(self.kernel_sizes) - steps)))
        maxima = []
        for size, convolution in zip(self.kernel_sizes, self.convolutions, strict=True):
            maps_bcw = convolution(x_bft).relu()
            own_bw = length_mask((lengths_b - size + 1).clamp(min=1), maps_bcw.shape[2])
            maxima.append(maps_bcw.masked_fill(~own_bw[:, None], 0.0).amax(dim=2))  # no map is below 0
        encoded_bd = self.linear(self.dropout(torch.cat(maxima, dim=1))).relu()
        return encoded_bd.masked_fill(lengths_b[:, None] == 0, 0.0)


def utterance_encoders(
    modalities: Mapping[str, int],
    dim: int,
    *,
    text_cnn: Collection[str] = ("text",),
    pooling: Literal["max", "last"] = "max",
    channels: int = 128,
    dropout: float = 0.5,
) -> nn.ModuleDict:
    """An encoder for each modality: `TextCNN` for those named in `text_cnn`, `UtteranceLSTM` for the others.

    Args:
        modalities: name → feature size.
        dim: width D of every vector.
        text_cnn: names; those that are no modality have no effect.
        pooling: of the LSTMs.
        channels, dropout: of the TextCNNs.
    """
    return nn.ModuleDict(
        {
            name: TextCNN(size, dim, channels, dropout=dropout)
            if name in text_cnn
            else UtteranceLSTM(size, dim, pooling)
            for name, size in modalities.items()
        }
    )


def perceptron(inputs: int, hidden: int, outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Two hidden layers, each with a ReLU and dropout, and a linear layer on top."""
    layers: list[nn.Module] = []
    for size in (inputs, hidden):
        layers += [nn.Linear(size, hidden), nn.ReLU(), Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


def fusion(inputs: int, dim: int, dropout: float = 0.0) -> nn.Sequential:
    """A linear layer on the embeddings of all modalities side by side, a ReLU and dropout."""
    return nn.Sequential(nn.Linear(inputs, dim), nn.ReLU(), Dropout(dropout))

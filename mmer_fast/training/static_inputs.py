"""Batches of one shape, whatever their lengths: what a CUDA graph of the training step reads.

A packed batch has as many rows as valid tokens, another number in each batch. Here the tokens of each modality are
filled up to one of few numbers by **fillers**, samples of zeros behind the real ones. A sample attends to its own
tokens alone and no layer normalises over the batch, so fillers change nothing of the others; they have no labels and no
masks, and receive no gradient.

Tokens are rounded up to the next of eight steps between powers of two (by 6 % on average), time steps to multiples of
64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmer_fast.data import Batch
from mmer_fast.models import RobMMR
from mmer_fast.models.layout import BatchLayout
from mmer_fast.models.robmmr import check_batch

_STEPS = 64  # time steps are multiples of this, as are steps between numbers of tokens at the least
_PER_OCTAVE = 8


@dataclass(frozen=True)
class Shape:
    """What batches have in common that one CUDA graph serves.

    Attributes:
        samples: without fillers.
        fillers: samples that fill up.
        steps: T of each modality, in the order of the model.
        tokens: of each modality, those of the fillers included.
    """

    samples: int
    fillers: int
    steps: tuple[int, ...]
    tokens: tuple[int, ...]


def shape_of(model: RobMMR, batch: Batch) -> Shape:
    """The shape that holds a batch; reads the lengths on the CPU.

    Raises:
        ValueError: a modality is absent or has another shape than announced.
    """
    check_batch(model.modalities, batch.features, batch.lengths)
    steps, tokens, fillers = [], [], 1
    counted = batch.host_lengths
    for name in model.modalities:
        longest = _rounded_up(max(1, batch.features[name].shape[1]), _STEPS)
        count = int(counted[name].sum())
        step = max(_STEPS, (1 << count.bit_length() >> 1) // _PER_OCTAVE)
        steps.append(longest)
        tokens.append(_rounded_up(max(1, count), step))
        fillers = max(fillers, -(-step // longest))
    return Shape(len(batch), fillers, tuple(steps), tuple(tokens))


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class StaticInputs:
    """Tensors on the device for the batches of one shape; `load` overwrites them.

    Attributes:
        batch: (B + fillers, T, F) and (B + fillers,) of each modality; labels (B, K); no index, which no step reads.
        layout: of these samples. No shape and no number in it depends on the lengths.

    Args:
        model: on its device; of a configuration where padding does not count.
        shape: of the batches.
        like: a batch with the dtypes to come.
    """

    def __init__(self, model: RobMMR, shape: Shape, like: Batch) -> None:
        self.shape = shape
        self._names = list(model.modalities)
        rows = shape.samples + shape.fillers
        features = {
            name: like.features[name].new_zeros((rows, steps, like.features[name].shape[2]))
            for name, steps in zip(self._names, shape.steps, strict=True)
        }
        self.layout = self._layout_of(like).to(like.labels.device)
        self.batch = Batch(features, self.layout.lengths, torch.zeros_like(like.labels), like.index[:0])

    def load(self, batch: Batch) -> None:
        """Copy a batch of this shape in; waits for nothing. What is beyond the lengths stays from earlier batches."""
        for name, x_btf in self.batch.features.items():
            given = batch.features[name]
            x_btf[: given.shape[0], : given.shape[1]].copy_(given, non_blocking=True)
        self.batch.labels.copy_(batch.labels, non_blocking=True)
        self.layout.copy_(self._layout_of(batch))

    def _layout_of(self, batch: Batch) -> BatchLayout:
        """That of a batch with its fillers, on the CPU."""
        shape, host, lengths = self.shape, batch.host_lengths, {}
        for name, steps, tokens in zip(self._names, shape.steps, shape.tokens, strict=True):
            counted_b = host[name].to(torch.int64)
            lengths[name] = torch.cat([counted_b, _filled(tokens - int(counted_b.sum()), steps, shape.fillers)])
        layout = BatchLayout.of(lengths, dict(zip(self._names, shape.steps, strict=True)))
        return replace(layout.bounded(), fillers=shape.fillers)


def _filled(tokens: int, steps: int, fillers: int) -> Tensor:
    """Lengths (fillers,) of at most `steps` that sum to `tokens`."""
    return (tokens - steps * torch.arange(fillers)).clamp(0, steps)

"""A case of attention, and its inputs: self-attention of a batch whose samples differ in length, or of a dense one.

Valid pairs are those of a valid query with a valid key of its sample: what must be computed. The gradient of the output
is 0 at padded queries, as it is where a loss leaves them out, so that every contestant has the same gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import mmer_fast as mf

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Attention of (batch, heads, length, width), L = S = `length`.

    `padding`: the share of the (batch, length) tokens that is padding, by lengths evenly drawn (`draw_lengths`).
    """

    name: str
    batch: int
    heads: int
    width: int
    length: int
    dtype: str = "fp32"
    padding: float = 0.5

    @property
    def padded(self) -> bool:
        return self.padding > 0


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case on its device.

    Attributes:
        q, k, v: (B, H, L, D) in the dtype of the case.
        key_weights: (B, L) float32 in [0.1, 1].
        grad_out: (B, H, L, D), dL/do, 0 at padded queries.
        lengths: (B,) int64.
        padded: whether some length is below L.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_weights: Tensor
    grad_out: Tensor
    lengths: Tensor
    padded: bool

    @cached_property
    def valid(self) -> Tensor:
        """(B, L) bool: True at the tokens of a sample."""
        return torch.arange(self.q.shape[2], device=self.q.device) < self.lengths[:, None]

    @cached_property
    def layout(self) -> mf.PackedLayout:
        return mf.packed_layout(self.lengths)

    @cached_property
    def pairs(self) -> int:
        """Valid pairs of all heads."""
        return int(self.lengths.square().sum()) * self.q.shape[1]

    def pack(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> (total, H, D), or (B, L) -> (total,)."""
        return mf.pack(x.transpose(1, 2) if x.dim() == 4 else x, self.layout).contiguous()

    def unpack(self, x: Tensor) -> Tensor:
        """(total, H, D) -> (B, H, L, D), or (total,) -> (B, L)."""
        padded = mf.unpack(x, self.layout, self.q.shape[2])
        assert isinstance(padded, Tensor)
        return padded.transpose(1, 2) if padded.dim() == 4 else padded


def draw_lengths(batch: int, length: int, padding: float, generator: torch.Generator) -> Tensor:
    """(batch,) lengths in 1..length in random order whose mean is about (1 - padding) length.

    They come one from each of `batch` equal parts of the widest interval in 0..length around this mean: of 0..length
    where half of it is padding.
    """
    even = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    width = 2 * min(padding, 1 - padding)
    lengths = (1 - padding - width / 2 + even * width) * length
    return lengths.ceil().clamp(1, length).to(torch.int64)


def build(case: Case, device: str, seed: int = 0) -> Inputs:
    """The inputs of `case`: drawn on the CPU, so that every device gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.heads, case.length, case.width)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, DTYPES[case.dtype]) for _ in range(4))
    weights = 0.1 + 0.9 * torch.rand(case.batch, case.length, generator=generator)
    lengths = torch.full((case.batch,), case.length)
    if case.padded:
        lengths = draw_lengths(case.batch, case.length, case.padding, generator)
    inputs = Inputs(q, k, v, weights.to(device), grad, lengths.to(device), case.padded)
    grad.mul_(inputs.valid[:, None, :, None])
    return inputs

"""Into a stack of layers without padding, and out again.

If anything in a batch is padding and its pattern may be read, the tokens are packed once and every layer sees
(total, E). Under ``torch.compile`` a size that depends on values would break the graph, and under ``torch.func.vmap``
each sample would have its own: there the batch stays padded, the padding is zeroed on the way in and on the way out,
and attention alone skips it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmer_fast.nn.masks import check_key_padding_mask
from mmer_fast.ops import _validate
from mmer_fast.ops.lengths import length_mask
from mmer_fast.ops.packing import PackedLayout, packed_layout


@dataclass(frozen=True)
class Padding:
    """What is padding in a batch (B, T).

    Attributes:
        valid: (B, T) bool, True at the tokens; None where all are.
        layout: of the tokens, where they are to be packed.
        suffix: whether all padding comes behind the tokens; only with a layout.
    """

    valid: Tensor | None
    layout: PackedLayout | None
    suffix: bool = True

    def positional_bias(self, bias: Tensor) -> Tensor:
        """A bias over padded positions, (1|B, 1|H, T, T), by positions within the packed samples."""
        assert self.layout is not None
        assert self.valid is not None
        longest = self.layout.max_seqlen
        if self.suffix:
            return bias[..., :longest, :longest]
        # Tokens first, in their order: what stands behind a sample's tokens is never read.
        time = (~self.valid).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :longest]
        batch, heads = bias.shape[:2]
        samples = torch.arange(batch, device=bias.device)[:, None, None, None]
        return bias[
            samples, torch.arange(heads, device=bias.device)[:, None, None], time[..., None], time[..., None, :]
        ]


def find_padding(
    name: str, key_padding_mask: Tensor | None, lengths: Tensor | None, batch: int, steps: int, device: torch.device
) -> Padding:
    """What `lengths` and a bool `key_padding_mask` say is padding; they combine.

    Args:
        name: of the mask.
        key_padding_mask: (B, T) bool, True at the padding. A floating one is a bias and says nothing here.
        lengths: (B,) integers in [0, T].

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or length.
    """
    check_key_padding_mask(name, key_padding_mask, (batch, steps), device)
    hard = key_padding_mask is not None and key_padding_mask.dtype == torch.bool
    if lengths is None and not hard:
        return Padding(None, None)
    valid = ~key_padding_mask if hard and key_padding_mask is not None else None
    if lengths is not None:
        _validate.integer_tensor("lengths", lengths)
        if lengths.shape != (batch,) or lengths.device != device:
            raise ValueError(
                f"lengths must have shape (B,) = ({batch},) on {device}, got {tuple(lengths.shape)} on {lengths.device}"
            )
        within = length_mask(lengths, steps)
        valid = within if valid is None else valid & within
    assert valid is not None
    if not _can_read(valid):
        return Padding(valid, None)
    if batch == 0:
        return Padding(None, None)
    if lengths is not None:
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > steps:
            raise ValueError(f"lengths must be within [0, T={steps}], got {low if low < 0 else high}")
    layout = packed_layout(valid.sum(1))
    if layout.total == batch * steps:
        return Padding(None, None)
    if not hard or torch.equal(valid, length_mask(layout.lengths, steps)):
        return Padding(valid, layout)
    return Padding(valid, layout.at(valid), suffix=False)


def _can_read(valid: Tensor) -> bool:
    """Whether the pattern may be read here, as inside ``torch.func.grad`` it may."""
    if torch.compiler.is_compiling() or valid.is_meta:
        return False
    while torch._C._functorch.is_gradtrackingtensor(valid):
        valid = torch._C._functorch.get_unwrapped(valid)
    return _validate.is_plain(valid)


def reach(valid: Tensor) -> Tensor:
    """(B,) int64: the last position of each row of `valid` (B, T) that counts, plus one; 0 where none does."""
    if valid.shape[1] == 0:
        return valid.new_zeros(valid.shape[0], dtype=torch.int64)
    return (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).amax(1)

"""What a transformer layer and a stack of them share: a padded batch comes in and goes out, tokens are computed on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmer_fast.nn.attention import check_layout
from mmer_fast.nn.masks import additive, with_batch
from mmer_fast.nn.padding import Padding, find_padding, reach
from mmer_fast.ops import _validate
from mmer_fast.ops.packing import PackedLayout, pack, unpack


class Beside(NamedTuple):
    """What goes through the layers beside the tokens.

    Attributes:
        mask: of PyTorch's convention; with a layout a bias (1|B, 1|H, longest, longest).
        padding_mask: (B, T) of PyTorch's convention; None with a layout.
        is_causal: the causal rule holds and `mask` is not read.
        lengths: (B,) integers; None with a layout.
        key_weights: (B, T) or (B, H, T); with a layout (total,) or (total, H).
        layout: of packed tokens.
    """

    mask: Tensor | None
    padding_mask: Tensor | None
    is_causal: bool
    lengths: Tensor | None
    key_weights: Tensor | None
    layout: PackedLayout | None


class OnTokens(nn.Module):
    """A module whose `_run` computes on (total, E) with a layout, and on a whole batch without."""

    heads: int
    batch_first: bool
    mask_name = "mask"  # of the argument of `forward`

    def _run(self, x: Tensor, beside: Beside) -> Tensor:
        raise NotImplementedError

    def _encode(self, src: Tensor, beside: Beside) -> Tensor:
        """From what `forward` was called with to `_run` and back to the shape of `src`, 0 in the padding."""
        if beside.is_causal:  # in torch's way: it says that the mask is the causal one
            beside = beside._replace(mask=None)
        if beside.layout is not None:
            check_layout("layout", beside.layout)
            return self._run(src, _checked(src, beside, beside.layout, self.heads, self.mask_name))
        if src.dim() not in (2, 3):
            raise ValueError(f"src must have two or three dimensions, got {tuple(src.shape)}")
        if src.dim() == 3:
            return self._encode_batch(src, beside)
        mask, padding_mask, is_causal, lengths, key_weights, _ = beside
        padding_mask, lengths, key_weights = with_batch(
            src_key_padding_mask=padding_mask, lengths=lengths, key_weights=key_weights
        )
        beside = Beside(mask, padding_mask, is_causal, lengths, key_weights, None)
        batch = 0 if self.batch_first else 1
        return self._encode_batch(src.unsqueeze(batch), beside).squeeze(batch)

    def _encode_batch(self, src: Tensor, beside: Beside) -> Tensor:
        batch, steps = src.shape[:2] if self.batch_first else (src.shape[1], src.shape[0])
        if beside.mask is not None:  # once for all layers, and by the name that it has here
            mask = additive(self.mask_name, beside.mask, (batch, self.heads, steps, steps), src.device)
            beside = beside._replace(mask=mask)
        given = beside.padding_mask
        padding = find_padding("src_key_padding_mask", given, beside.lengths, batch, steps, src.device)
        soft = None if given is None or given.dtype == torch.bool else given
        beside = beside._replace(padding_mask=soft, lengths=None)
        if padding.valid is None:
            return self._run(src, beside)
        if padding.layout is not None and soft is None:
            return self._on_packed(src, beside, padding, padding.layout)
        hidden = ~padding.valid
        outside = (hidden if self.batch_first else hidden.T).unsqueeze(-1)
        masked = beside._replace(
            padding_mask=hidden if soft is None else soft.masked_fill(hidden, -torch.inf), lengths=reach(padding.valid)
        )
        return self._run(src.masked_fill(outside, 0.0), masked).masked_fill(outside, 0.0)

    def _on_packed(self, src: Tensor, beside: Beside, padding: Padding, layout: PackedLayout) -> Tensor:
        """Packs, computes and unpacks."""
        src = src if self.batch_first else src.transpose(0, 1)
        batch, steps = src.shape[:2]
        bias, weights = None, beside.key_weights
        if beside.mask is not None:
            bias = padding.positional_bias(beside.mask)
        if weights is not None:
            _validate.floating_tensor("key_weights", weights)
            _validate.same_device("key_weights", weights, src, "src")
            if tuple(weights.shape) not in ((batch, steps), (batch, self.heads, steps)):
                raise ValueError(
                    f"key_weights must have shape (B, T) = {(batch, steps)} or "
                    f"(B, H, T) = {(batch, self.heads, steps)}, got {tuple(weights.shape)}"
                )
            weights = pack(weights if weights.dim() == 2 else weights.transpose(1, 2), layout)
        beside = beside._replace(mask=bias, key_weights=weights, layout=layout)
        out = unpack(self._run(pack(src, layout), beside), layout, steps)
        assert isinstance(out, Tensor)
        return out if self.batch_first else out.transpose(0, 1)


def _checked(src: Tensor, beside: Beside, layout: PackedLayout, heads: int, mask_name: str) -> Beside:
    """The arguments of a call on packed tokens."""
    if beside.padding_mask is not None or beside.lengths is not None:
        raise ValueError("packed tokens have no padding: layout goes without src_key_padding_mask and lengths")
    if src.dim() != 2 or src.shape[0] != layout.total:
        raise ValueError(f"src must have shape ({layout.total}, E) as its layout says, got {tuple(src.shape)}")
    if beside.mask is None:
        return beside
    shape = (layout.lengths.shape[0], heads, layout.max_seqlen, layout.max_seqlen)
    return beside._replace(mask=additive(mask_name, beside.mask, shape, src.device))

"""The masks of `torch.nn`'s attention modules in the terms of `masked_attention`.

There True means "may not attend", and a floating mask is added to the scores. Here True is a key that counts, and what
differs from query to query is a bias with -inf.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.ops import _validate
from mmer_fast.ops.lengths import length_mask
from mmer_fast.ops.philox import attention_keep_mask, dropout_scale


class AttendedKeys(NamedTuple):
    """Which keys a query attends to, and how: arguments of `masked_attention`.

    Attributes:
        weights: (N, S) or (N, H, S).
        lengths: (N,) integers.
        mask: (N, S) bool, True at the keys that count.
        bias: (1|N, 1|H, 1|L, S) floating.
        causal: whether query i attends to the keys j <= i only.
    """

    weights: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    causal: bool

    def followed_by(self, more: int, shape: tuple[int, int, int, int], device: torch.device) -> AttendedKeys:
        """The same with `more` keys behind the S ones of `shape` (N, H, L, S), to which every query attends."""
        weights, lengths, mask, bias, causal = self
        queries, keys = shape[2:]
        if lengths is not None:
            within = length_mask(lengths, keys)
            mask = within if mask is None else mask & within
        if causal:
            later = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)
            bias = _sum(bias, additive("attn_mask", later, shape, device))
        return AttendedKeys(
            None if weights is None else F.pad(weights, (0, more), value=1.0),
            None,
            None if mask is None else F.pad(mask, (0, more), value=True),
            None if bias is None else F.pad(bias, (0, more)),
            False,
        )


def attended_keys(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    key_weights: Tensor | None,
    lengths: Tensor | None,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> AttendedKeys:
    """Arguments of `torch.nn.MultiheadAttention.forward` as those of `masked_attention`; `shape` is (N, H, L, S)."""
    check_key_padding_mask("key_padding_mask", key_padding_mask, (shape[0], shape[3]), device)
    mask, bias = None, None
    if key_padding_mask is not None and key_padding_mask.dtype == torch.bool:
        mask = ~key_padding_mask
    elif key_padding_mask is not None:
        bias = key_padding_mask[:, None, None]
    if attn_mask is not None and not is_causal:
        bias = _sum(bias, additive("attn_mask", attn_mask, shape, device))
    return AttendedKeys(key_weights, lengths, mask, bias, is_causal)


def with_batch(**tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments of a call without a batch, as a batch of one."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    return tuple(None if x is None else x.unsqueeze(0) for x in tensors.values())


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def check_key_padding_mask(name: str, value: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """Checks a padding mask of PyTorch's convention, (N, S) bool or floating."""
    if value is None:
        return
    _validate.bool_or_floating_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape (N, S) = {shape}, got {tuple(value.shape)}")
    _validate.on_device(name, value, device, "the queries")


def additive(name: str, mask: Tensor, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """An attention mask of PyTorch's convention as a bias.

    Args:
        name: of the argument.
        mask: ``(L, S)`` or ``(N H, L, S)``, bool (True may not attend) or floating; a bias of four dimensions passes.
        shape: ``(N, H, L, S)``.
        device: of queries and keys.

    Returns:
        ``(1|N, 1|H, L, S)`` floating, 0 and -inf where the mask is bool.
    """
    _validate.bool_or_floating_tensor(name, mask)
    _validate.on_device(name, mask, device, "the queries")
    batch, heads, queries, keys = shape
    if mask.dim() == 2 and mask.shape == (queries, keys):
        mask = mask[None, None]
    elif mask.dim() == 3 and mask.shape == (batch * heads, queries, keys):
        mask = mask.unflatten(0, (batch, heads))
    elif mask.dim() != 4 or any(n not in (1, full) for n, full in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"{name} must have shape (L, S) = {(queries, keys)} or (N H, L, S) = {(batch * heads, queries, keys)}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -torch.inf)


def is_causal_mask(mask: Tensor) -> bool:
    """Whether `mask` (T, T) of PyTorch's convention hides just the keys j > i; reads it."""
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    later = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, later)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(later, -torch.inf))


def weights_of_attention(
    q: Tensor, k: Tensor, lse: Tensor, attended: AttendedKeys, dropout_p: float, seed: Any
) -> Tensor:
    """The weights ``p_ij = m_j e^(x_ij - lse_i)`` that `masked_attention` used: differentiable, through lse too.

    Args:
        q, k: (N, H, L, D), (N, H, S, D).
        lse: (N, H, L) as it came back, -inf for a query that has no key or does not count.
        attended, dropout_p, seed: what it was called with; the scale is its default.

    Returns:
        (N, H, L, S) in the dtype of lse, 0 where an entry is excluded or dropped.
    """
    batch, heads, queries, width = q.shape
    keys, wide = k.shape[2], lse.dtype
    m = attended.weights
    m = m.unsqueeze(1) if m is not None and m.dim() == 2 else m
    taken = torch.ones(batch, 1, keys, dtype=torch.bool, device=q.device)
    if attended.lengths is not None:
        taken = taken & length_mask(attended.lengths, keys)[:, None]
    if attended.mask is not None:
        taken = taken & attended.mask[:, None]
    if m is not None:
        taken = taken & (m != 0)
    empty = lse == -torch.inf
    # Zeros for whatever is left out, before the product: NaN there would reach the gradients.
    q = q.to(wide).masked_fill(empty[..., None], 0.0)
    k = k.to(wide).masked_fill(~taken[..., None], 0.0)
    with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):  # meta has no autocast
        x = width**-0.5 * (q @ k.transpose(-1, -2))
    if attended.bias is not None:
        x = x + attended.bias.to(wide)
    included = taken[:, :, None] & ~empty[..., None]
    if attended.causal:
        included = included & torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    p = (x - lse[..., None]).masked_fill(~included, -torch.inf).exp()
    if m is not None:
        p = p * m.to(wide).masked_fill(~taken, 0.0)[:, :, None]
    if dropout_p > 0:
        kept = attention_keep_mask(batch, heads, queries, keys, dropout_p, seed, q.device)
        p = p * kept * dropout_scale(dropout_p)
    return p

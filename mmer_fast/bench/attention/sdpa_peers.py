"""PyTorch's attention in the ways in which it can leave padding out and give the weights a gradient."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmer_fast.bench.attention.cases import Inputs
from mmer_fast.bench.attention.contestants import Attend

_SDPA = F.scaled_dot_product_attention
_EXCLUDED = -1e4  # the log weight of a padded key where -inf would become NaN


def _chosen(kernel: SDPBackend | None) -> AbstractContextManager[None]:
    return nullcontext() if kernel is None else sdpa_kernel(kernel)


def bool_mask(kernel: SDPBackend | None, inputs: Inputs) -> Attend:
    """A boolean mask (B, 1, 1, S); none where nothing is padded."""
    mask = inputs.valid[:, None, None] if inputs.padded else None

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        with _chosen(kernel):
            return _SDPA(q, k, v, attn_mask=mask)

    return attend


def mask_gradient(kernel: SDPBackend | None, inputs: Inputs) -> Attend:
    """The mask log m, -inf in the padding, expanded to (B, H, L, S): softmax(x + log m) is what our weights are."""
    padding, (batch, heads, length, _) = ~inputs.valid, inputs.q.shape

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        assert m is not None
        mask = m.log().masked_fill(padding, -torch.inf).to(q.dtype)
        with _chosen(kernel):
            return _SDPA(q, k, v, attn_mask=mask[:, None, None].expand(batch, heads, length, length))

    return attend


def widen(q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of width D + 8 whose scores over sqrt(D) are those of D plus `log_weights` (of the shape of k[..., 0]).

    The columns more are 1 in q and sqrt(D) log m in k, and zeros for the alignment that kernels ask for.
    """
    column = (math.sqrt(q.shape[-1]) * log_weights).to(k.dtype)[..., None]
    return (
        torch.cat([q, torch.ones_like(q[..., :1]), torch.zeros_like(q[..., :7])], -1),
        torch.cat([k, column, torch.zeros_like(k[..., :7])], -1),
        F.pad(v, (0, 8)),
    )


def rank_one(kernel: SDPBackend | None, inputs: Inputs) -> Attend:
    """The weights inside of q and k (see `widen`): a mask gradient without a mask."""
    padding, heads, width = ~inputs.valid, inputs.q.shape[1], inputs.q.shape[-1]

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        assert m is not None
        log_weights = m.log().masked_fill(padding, _EXCLUDED)[:, None].expand(-1, heads, -1)
        with _chosen(kernel):
            return _SDPA(*widen(q, k, v, log_weights), scale=width**-0.5)[..., :width]

    return attend


def loop(inputs: Inputs) -> Attend:
    """A call for each sample on what is valid of it."""
    lengths, length = inputs.lengths.tolist(), inputs.q.shape[2]

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        outs = []
        # unbind, whose backward is one stack: that of q[b] would fill a whole batch with zeros for each sample
        for q_b, k_b, v_b, n in zip(q.unbind(), k.unbind(), v.unbind(), lengths, strict=True):
            out = _SDPA(q_b[None, :, :n], k_b[None, :, :n], v_b[None, :, :n])
            outs.append(F.pad(out[0], (0, 0, 0, length - n)))
        return torch.stack(outs)

    return attend


def nested(inputs: Inputs) -> Attend:
    """Jagged nested tensors, made from packed tokens."""
    offsets, longest = inputs.layout.cu_seqlens.to(torch.int64), inputs.layout.max_seqlen

    def jagged(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=1, max_seqlen=longest).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        return _SDPA(jagged(q), jagged(k), jagged(v)).transpose(1, 2).values()

    return attend

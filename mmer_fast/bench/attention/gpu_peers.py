"""Peers that need a GPU: variable-length flash kernels on packed tokens, and compiled FlexAttention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmer_fast.bench.attention.cases import Inputs
from mmer_fast.bench.attention.contestants import Attend
from mmer_fast.bench.attention.sdpa_peers import widen


def varlen(kernel: str, rank_one: bool, inputs: Inputs) -> Attend:
    """``"torch"``: torch.nn.attention.varlen; ``"flash_attn"``: the package. `rank_one`: weights inside of q and k."""
    layout, width = inputs.layout, inputs.q.shape[-1]
    ends, longest, heads = layout.cu_seqlens, layout.max_seqlen, inputs.q.shape[1]
    function: Any
    if kernel == "torch":
        from torch.nn.attention.varlen import varlen_attn

        function = partial(varlen_attn, scale=width**-0.5)
    else:
        from flash_attn import flash_attn_varlen_func

        function = partial(flash_attn_varlen_func, softmax_scale=width**-0.5)

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        if not rank_one:
            return function(q, k, v, ends, ends, longest, longest)
        assert m is not None
        wide = widen(q, k, v, m.log()[:, None].expand(-1, heads))
        return function(*wide, ends, ends, longest, longest)[..., :width]

    return attend


def flex(compiled: bool, inputs: Inputs) -> Attend:
    """FlexAttention: a block mask by lengths, and log m added to the scores where weights are given."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths, (batch, _, length, _) = inputs.lengths, inputs.q.shape

    def valid_pair(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i < lengths[b]) & (j < lengths[b])

    block_mask = None
    if inputs.padded:
        block_mask = create_block_mask(valid_pair, batch, None, length, length, device=lengths.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        if m is None:
            return flex_attention(q, k, v, block_mask=block_mask)
        log_weights = m.log()

        def add_weights(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + log_weights[b, j]

        return flex_attention(q, k, v, score_mod=add_weights, block_mask=block_mask)

    return torch.compile(attend, dynamic=False, fullgraph=True) if compiled else attend

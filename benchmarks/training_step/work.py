"""The FLOP of a training step: those of the matrix products and of attention that run in it, counted as they run."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmer_fast.bench.roofline import Work
from mmer_fast.bench.timing import Call
from mmer_fast.ops.attention_inputs import Inputs

# Where the first factor stands in the arguments of a product.
_FIRST_FACTOR = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::baddbmm": 1,
    "mkldnn::_linear_pointwise": 0,
}
_ATTENTION_FORWARD, _ATTENTION_BACKWARD = "mmer_fast::attention_forward", "mmer_fast::attention_backward"
_SAVED, _NEEDED = 4, 2  # arguments of the backward operator before and after those of the forward one


class _Count(TorchDispatchMode):
    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in _FIRST_FACTOR:
            self.flops += 2 * out.numel() * args[_FIRST_FACTOR[name]].shape[-1]
        elif name == "aten::mkldnn_linear_backward_weights":
            self.flops += 2 * out[0].numel() * args[0].shape[0]
        elif name.startswith(_ATTENTION_BACKWARD):
            self.flops += 10 * attention_products(Inputs(*args[_SAVED:-_NEEDED]))
        elif name.startswith(_ATTENTION_FORWARD):
            self.flops += 4 * attention_products(Inputs(*args))
        return out


def count(call: Call) -> Work:
    """The FLOP of a call of ours: 2 m n k a product, and 4 D forward, 10 D backward for each valid pair of a head."""
    with _Count() as counter:
        call()
    return Work(flops=counter.flops)


def attention_products(inputs: Inputs) -> int:
    """Valid pairs of all heads, times the width of a head."""
    heads, width = inputs.q.shape[1], inputs.q.shape[-1]
    if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
        pairs = (inputs.cu_seqlens_q.diff().long() * inputs.cu_seqlens_k.diff()).sum()
        return int(pairs) * heads * width
    queries, keys = (
        torch.full(x.shape[:1], x.shape[2], device=x.device) if lengths is None else lengths
        for x, lengths in ((inputs.q, inputs.query_lengths), (inputs.k, inputs.lengths))
    )
    return int((queries * keys).sum()) * heads * width

"""The dispatcher's operators of attention with soft key weights, on the CPU so far (csrc/attention.cpp).

Not public yet: `mmer_fast.ops.attention_reference` has the semantics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmer_fast.ops._library import NAMESPACE, define

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_weights, Tensor? lengths, Tensor? query_lengths, Tensor? mask, "
    "Tensor? bias, bool causal, float scale"
)
define("attention_forward", f"({_INPUTS}) -> (Tensor out, Tensor lse)")
# grad_weights is (B, H, S): the gradient of each head's own weights, to be summed where heads share them.
define(
    "attention_backward",
    f"(Tensor grad_out, Tensor out, Tensor lse, {_INPUTS}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_weights)",
)
attention_forward = torch.ops.mmer_fast.attention_forward.default
attention_backward = torch.ops.mmer_fast.attention_backward.default


@torch.library.register_fake(f"{NAMESPACE}::attention_forward")
def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::attention_backward")
def _fake_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, key_weights: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys = k.shape[2] if key_weights is not None else 0
    grad_weights = q.new_empty((*q.shape[:2], keys), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_weights

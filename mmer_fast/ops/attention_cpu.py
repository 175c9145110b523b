"""The dispatcher's operator of attention with soft key weights: forward only so far, on the CPU (csrc/attention.cpp).

Not public: `mmer_fast.ops.attention_reference` has the semantics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmer_fast.ops._library import NAMESPACE, define

define(
    "attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_weights, Tensor? lengths, Tensor? query_lengths, Tensor? mask, "
    "Tensor? bias, bool causal, float scale) -> (Tensor out, Tensor lse)",
)
attention_forward = torch.ops.mmer_fast.attention_forward.default


@torch.library.register_fake(f"{NAMESPACE}::attention_forward")
def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)

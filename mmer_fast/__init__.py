"""mmer_fast: operators for robust multi-modal training in PyTorch, and the reference model that uses them.

    import mmer_fast as mf
    weights = mf.soft_topk(scores, k)          # differentiable top-k, (..., n) -> (..., n)
    mask = mf.temporal_mask(scores, ratio=0.4) # the soft temporal mask of ATM
    x = mf.grad_reverse(x)                     # gradient reversal
    tokens = mf.pack(x, layout)                # (B, T, D) -> (total, D), without the padding
    out = mf.masked_attention(q, k, v, mask)   # attention with soft key weights; packed_attention on tokens
    with mf.perturbed(model, radius=0.05): ... # weights a step up the loss, in place, restored bit for bit

`mf.backends()` and ``python -m mmer_fast.info`` say what can run on this machine and why the rest cannot.
"""

from __future__ import annotations

from mmer_fast import nn, ops, optim
from mmer_fast._version import __version__
from mmer_fast.ops._backends import BackendUnavailable, backends, checked, use_backend
from mmer_fast.ops.attention import masked_attention, packed_attention
from mmer_fast.ops.grad_reverse import grad_reverse
from mmer_fast.ops.kl_divergence import bernoulli_kl_with_logits, softmax_kl_with_logits
from mmer_fast.ops.packing import PackedLayout, pack, packed_layout, unpack
from mmer_fast.ops.sdpa import scaled_dot_product_attention
from mmer_fast.ops.soft_topk import SoftTopKInfo, soft_topk
from mmer_fast.ops.temporal_mask import temporal_mask
from mmer_fast.perturbation import Perturbation, PerturbationInfo, perturb_, perturbed, release_stash

__all__ = [
    "BackendUnavailable",
    "PackedLayout",
    "Perturbation",
    "PerturbationInfo",
    "SoftTopKInfo",
    "__version__",
    "backends",
    "bernoulli_kl_with_logits",
    "checked",
    "grad_reverse",
    "masked_attention",
    "nn",
    "ops",
    "optim",
    "pack",
    "packed_attention",
    "packed_layout",
    "perturb_",
    "perturbed",
    "release_stash",
    "scaled_dot_product_attention",
    "soft_topk",
    "softmax_kl_with_logits",
    "temporal_mask",
    "unpack",
    "use_backend",
]

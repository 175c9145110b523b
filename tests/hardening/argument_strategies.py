"""Arguments of the public operators, drawn by hypothesis: what fits together, and then often one that does not.

STRATEGIES["soft_topk"] -> (function, keyword arguments); those of what moves weights and of the modules have files of
their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from drawn_tensors import BACKENDS, FLOATS, SIZES, Call, any_shape, disturbed, maybe, tensors
from hypothesis import strategies as st
from module_strategies import MODULE_STRATEGIES
from weight_strategies import WEIGHT_STRATEGIES

import mmer_fast as mf


@st.composite
def soft_topk(draw: Any, function: Callable[..., Any]) -> Call:
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=3)))
    batch, n = shape[:-1], shape[-1]
    arguments = {
        "scores": draw(tensors(shape, draw(st.sampled_from(FLOATS)))),
        "epsilon": draw(st.one_of(st.sampled_from([0.1, 1e-9, 10.0]), tensors(batch, torch.float64).map(torch.abs))),
        "lengths": draw(maybe(tensors(batch, torch.int64, 0, n))),
        "mask": draw(maybe(tensors(shape, torch.bool))),
        "largest": draw(st.booleans()),
        "normalizer": draw(st.sampled_from([1.0, 2, "max"])),
        "backend": draw(BACKENDS),
        "k": draw(st.one_of(st.integers(0, n), st.floats(0, n), tensors(batch, torch.float32).map(torch.abs))),
    }
    if function is mf.temporal_mask:
        arguments["ratio"] = draw(st.floats(0, 1))
        arguments["k"] = draw(maybe(st.integers(0, n)))
    if draw(st.booleans()):
        arguments["solver"], arguments["iterations"] = "sinkhorn", draw(maybe(st.integers(1, 4)))
        arguments["epsilon"] = 0.1  # float32 does not tell the published iterates apart where it is tiny
    return function, draw(disturbed(arguments))


@st.composite
def masked_attention(draw: Any) -> Call:
    batch, key_heads, group, queries, keys = (draw(SIZES) for _ in range(5))
    heads, width, dtype = key_heads * group, draw(st.integers(1, 9)), draw(st.sampled_from(FLOATS))
    arguments = {
        "q": draw(tensors((batch, heads, queries, width), dtype)),
        "k": draw(tensors((batch, key_heads, keys, width), dtype)),
        "v": draw(tensors((batch, key_heads, keys, width), dtype)),
        "key_weights": draw(
            maybe(tensors(draw(st.sampled_from([(batch, keys), (batch, heads, keys)])), torch.float32))
        ),
        "lengths": draw(maybe(tensors((batch,), torch.int64, 0, keys))),
        "query_lengths": draw(maybe(tensors((batch,), torch.int32, 0, queries))),
        "mask": draw(maybe(tensors((batch, keys), torch.bool))),
        "bias": draw(maybe(tensors((1, heads, queries, keys), torch.float32))),
        "causal": draw(st.booleans()),
        "scale": draw(maybe(st.sampled_from([1.0, -2.0, 0]))),
        "dropout_p": draw(st.sampled_from([0.0, 0.5])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "exact_zero_weight_grad": draw(st.booleans()),
        "backend": draw(BACKENDS),
    }
    if arguments["key_weights"] is not None:
        arguments["key_weights"] = arguments["key_weights"].abs().clamp(max=1)
    return mf.masked_attention, draw(disturbed(arguments))


@st.composite
def packed_attention(draw: Any) -> Call:
    counts = [draw(st.lists(SIZES, min_size=2, max_size=2)) for _ in range(2)]
    ends = [torch.tensor([0, a, a + b]) for a, b in counts]
    key_heads, group, width = draw(SIZES), draw(SIZES), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(FLOATS))
    arguments = {
        "q": draw(tensors((sum(counts[0]), key_heads * group, width), dtype)),
        "k": draw(tensors((sum(counts[1]), key_heads, width), dtype)),
        "v": draw(tensors((sum(counts[1]), key_heads, width), dtype)),
        "cu_seqlens_q": draw(st.one_of(st.just(ends[0]), tensors((3,), torch.int32))),
        "cu_seqlens_k": ends[1],
        "max_seqlen_q": draw(maybe(st.integers(0, 9))),
        "max_seqlen_k": draw(maybe(st.integers(0, 9))),
        "causal": draw(st.booleans()),
        "backend": draw(BACKENDS),
    }
    return mf.packed_attention, draw(disturbed(arguments))


@st.composite
def scaled_dot_product_attention(draw: Any) -> Call:
    leading, dtype = tuple(draw(st.lists(SIZES, max_size=2))), draw(st.sampled_from(FLOATS))
    queries, keys, width = draw(SIZES), draw(SIZES), draw(st.integers(1, 5))
    mask_dtype = draw(st.sampled_from([torch.bool, dtype]))
    arguments = {
        "query": draw(tensors((*leading, queries, width), dtype)),
        "key": draw(tensors((*leading, keys, width), dtype)),
        "value": draw(tensors((*leading, keys, draw(st.integers(1, 5))), dtype)),
        "attn_mask": draw(maybe(tensors((queries, keys), mask_dtype))),
        "is_causal": draw(st.booleans()),
        "scale": draw(maybe(st.sampled_from([0.5, 0]))),
        "enable_gqa": draw(st.booleans()),
    }
    return mf.scaled_dot_product_attention, draw(disturbed(arguments))


@st.composite
def divergence(draw: Any) -> Call:
    shape, dtype = draw(any_shape), draw(st.sampled_from(FLOATS))
    function, reduction = draw(
        st.sampled_from([(mf.bernoulli_kl_with_logits, "batchmean"), (mf.softmax_kl_with_logits, "mean")])
    )
    arguments = {name: draw(tensors(shape, dtype)) for name in ("p_logits", "q_logits")}
    arguments["reduction"] = draw(st.sampled_from([reduction, "sum", "none"]))
    return function, draw(disturbed(arguments))


@st.composite
def grad_reverse(draw: Any) -> Call:
    x = draw(tensors(draw(any_shape), draw(st.sampled_from(FLOATS))))
    return mf.grad_reverse, draw(disturbed({"x": x, "scale": draw(st.floats(0, 10))}))


def pack(x: Any, lengths: Any, padded_lengths: Any) -> Any:
    """Layout, packing and unpacking, which belong together."""
    layout = mf.packed_layout(*(lengths if isinstance(lengths, list) else [lengths]))
    return mf.unpack(mf.pack(x, layout), layout, padded_lengths)


@st.composite
def packing(draw: Any) -> Call:
    batch, modalities = draw(SIZES), draw(st.integers(1, 2))
    steps, dtype = draw(SIZES), draw(st.sampled_from(FLOATS))
    x = [draw(tensors((batch, steps, 2), dtype)) for _ in range(modalities)]
    arguments = {
        "x": x[0] if modalities == 1 else x,
        "lengths": [draw(tensors((batch,), torch.int64, 0, steps)) for _ in range(modalities)],
        "padded_lengths": draw(st.sampled_from([None, steps, steps + 2, [steps] * modalities])),
    }
    return pack, draw(disturbed(arguments))


STRATEGIES: dict[str, st.SearchStrategy[Call]] = {
    "soft_topk": soft_topk(mf.soft_topk),
    "temporal_mask": soft_topk(mf.temporal_mask),
    "masked_attention": masked_attention(),
    "packed_attention": packed_attention(),
    "scaled_dot_product_attention": scaled_dot_product_attention(),
    "divergence": divergence(),
    "grad_reverse": grad_reverse(),
    "packing": packing(),
    **WEIGHT_STRATEGIES,
    **MODULE_STRATEGIES,
}

"""Arguments of the public operators, drawn by hypothesis: what fits together, and then often one that does not.

STRATEGIES["soft_topk"] -> (function, keyword arguments)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import mmer_fast as mf
from mmer_fast import ops

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
SIZES = st.integers(0, 5)
Arguments = dict[str, Any]
Call = tuple[Callable[..., Any], Arguments]


@st.composite
def laid_out(draw: Any, x: Tensor) -> Tensor:
    """The same numbers in memory of another layout."""
    kind = draw(st.sampled_from(["as it is", "transposed", "sliced", "behind an offset", "expanded"]))
    if kind == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced" and x.dim() >= 1:
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if kind == "behind an offset":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if kind == "expanded" and x.dim() >= 1 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, low: int = -1, high: int = 5) -> Tensor:
    """Numbers of a drawn seed: normal ones, now and then with a special one; integers in [low, high]."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if dtype == torch.bool:
        return draw(laid_out(torch.rand(shape, generator=generator) < 0.7))
    if not dtype.is_floating_point and not dtype.is_complex:
        return draw(laid_out(torch.randint(low, max(low, high) + 1, shape, generator=generator).to(dtype)))
    x = torch.randn(shape, generator=generator)
    special = draw(st.sampled_from([None] * 6 + [0.0, math.nan, math.inf, -math.inf, 1e-42, 3e38]))
    if special is not None and x.numel() > 0:
        x.view(-1)[:: max(1, x.numel() // 2)] = special
    return draw(laid_out(x.to(dtype)))


any_shape = st.lists(SIZES, max_size=4).map(tuple)
any_tensor = st.tuples(any_shape, st.sampled_from(FLOATS + OTHERS)).flatmap(lambda pair: tensors(*pair))
elsewhere = any_tensor.map(lambda x: x.to("meta"))
NUMBERS = (-1, 0, 1, 3, 10**30, -0.5, 0.5, 1e-42, math.nan, math.inf, True)
junk = st.one_of(
    any_tensor,
    elsewhere,
    st.sampled_from(NUMBERS),
    st.sampled_from([None, "x", b"", (), object, "cpu", "reference", "cuda", "newton"]),
    st.lists(any_tensor, max_size=2),
)


@st.composite
def disturbed(draw: Any, arguments: Arguments) -> Arguments:
    """In half of all cases one argument is something else."""
    if draw(st.booleans()):
        arguments[draw(st.sampled_from(sorted(arguments)))] = draw(junk)
    return arguments


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


BACKENDS = st.sampled_from([None, None, "cpu", "reference"])


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


@st.composite
def perturbation(draw: Any, function: Callable[..., Any]) -> Call:
    shapes = draw(st.lists(any_shape, min_size=1, max_size=3))
    dtype = draw(st.sampled_from(FLOATS))
    params = [draw(tensors(shape, dtype)) for shape in shapes]
    lists = {
        "params": params,
        "grads": [draw(tensors(shape, draw(st.sampled_from(FLOATS)))) for shape in shapes],
        "stash": [torch.empty(w.shape, dtype=w.dtype) for w in params],
    }
    options = {"scope": draw(st.sampled_from(["global", "tensor", "awp"])), "adaptive": draw(st.booleans())}
    arguments: Arguments = {"backend": draw(BACKENDS)}
    if function is ops.restore_:
        arguments |= {name: lists[name] for name in ("params", "stash")}
    elif function is ops.grad_norm:
        arguments |= {name: lists[name] for name in ("params", "grads")} | options
    else:
        arguments |= lists | options | {"radius": draw(st.sampled_from([0, 0.5, 1e3]))}
    return function, draw(disturbed(arguments))


def perturbed_(module_or_params: Any, radius: Any, **options: Any) -> list[Tensor]:
    """What `mf.perturbed` says, and the weights inside of it; behind it they have their bits again, refused or not."""
    weights = [w for w in module_or_params if isinstance(w, Tensor)] if isinstance(module_or_params, list) else []
    before = [w.detach().clone() for w in weights]
    try:
        with mf.perturbed(module_or_params, radius, **options) as info:
            return [info.norm, info.factor, *(w.detach().clone() for w in weights)]
    finally:
        if not all(w.is_meta or same_bits(w, old) for w, old in zip(weights, before, strict=True)):
            raise AssertionError("a weight did not come back")


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().flatten()) for x in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


perturbed_.__signature__ = inspect.signature(mf.perturbed)  # type: ignore[attr-defined]
ALSO_NAMED = {perturbed_: {"parameter", "gradient"}}
"""What errors may name in the place of an argument: one of those in it."""


@st.composite
def perturbed(draw: Any) -> Call:
    _, arguments = draw(perturbation(ops.perturb_))
    weights = arguments.pop("params")
    if isinstance(weights, list):
        weights = [w.detach().requires_grad_(w.is_floating_point()) if isinstance(w, Tensor) else w for w in weights]
    arguments["module_or_params"] = weights
    del arguments["stash"]
    arguments["inv_scale"] = draw(st.sampled_from([None, 0.5, torch.tensor(0.25)]))
    return perturbed_, draw(disturbed(arguments))


STRATEGIES: dict[str, st.SearchStrategy[Call]] = {
    "soft_topk": soft_topk(mf.soft_topk),
    "temporal_mask": soft_topk(mf.temporal_mask),
    "masked_attention": masked_attention(),
    "packed_attention": packed_attention(),
    "scaled_dot_product_attention": scaled_dot_product_attention(),
    "divergence": divergence(),
    "grad_reverse": grad_reverse(),
    "packing": packing(),
    "perturbed": perturbed(),
    **{f.__name__: perturbation(f) for f in (ops.grad_norm, ops.perturb_, ops.restore_)},
}

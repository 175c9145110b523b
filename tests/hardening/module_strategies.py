"""Arguments of the modules' forward passes. A module is made anew for each call, and its parameters keep their bits.

Only what fits is drawn for the constructors, which say what does not themselves or, as PyTorch's, with an assertion.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from drawn_tensors import FLOATS, SIZES, Arguments, Call, bits_kept, disturbed, maybe, tensors
from hypothesis import strategies as st
from torch import Tensor, nn

import mmer_fast as mf

DTYPES = st.sampled_from(FLOATS)
DROPOUT = st.sampled_from([0.0, 0.0, 0.5])
SOME = st.integers(1, 3)


def called(make: Callable[..., nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `options` and the arguments of `method`: it makes a module of the options and calls it.

    `wide`: with the same weights in float64.
    """

    def function(options: Arguments, wide: bool = False, **arguments: Any) -> Any:
        torch.manual_seed(0)
        module = make(**options)
        module = module.double() if wide else module
        torch.manual_seed(1)  # what dropout draws
        with bits_kept(list(module.parameters())):
            return method(module, **shared(arguments))

    names = list(inspect.signature(method).parameters.values())[1:]
    function.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    function.__name__ = method.__qualname__
    return function


def shared(arguments: Arguments) -> Arguments:
    """With the key that is the query, and the value that is the key, where there is none."""
    if "query" in arguments:
        arguments.setdefault("key", arguments["query"])
        arguments.setdefault("value", arguments["key"])
    return arguments


def stack(num_layers: int, norm: bool, **layer: Any) -> mf.nn.TransformerEncoder:
    last = nn.LayerNorm(layer["d_model"], layer["layer_norm_eps"], dtype=layer["dtype"]) if norm else None
    return mf.nn.TransformerEncoder(mf.nn.TransformerEncoderLayer(**layer), num_layers, last)


ATTENTION = called(mf.nn.MultiheadAttention, mf.nn.MultiheadAttention.forward)
PACKED_ATTENTION = called(mf.nn.MultiheadAttention, mf.nn.MultiheadAttention.forward_packed)
LAYER = called(mf.nn.TransformerEncoderLayer, mf.nn.TransformerEncoderLayer.forward)
ENCODER = called(stack, mf.nn.TransformerEncoder.forward)


@st.composite
def with_options(draw: Any, options: Arguments, arguments: Arguments) -> Arguments:
    """One of the arguments may be something else; the options stay."""
    return {"options": options, **draw(disturbed(arguments))}


@st.composite
def weights(draw: Any, *shapes: tuple[int, ...]) -> Tensor:
    """Of keys, within [0, 1]."""
    return draw(tensors(draw(st.sampled_from(shapes)), torch.float32)).abs().clamp(max=1)


@st.composite
def masks(draw: Any, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensor:
    """Of PyTorch's convention: bool, or floating and added to the scores."""
    return draw(tensors(draw(st.sampled_from(shapes)), draw(st.sampled_from([torch.bool, dtype]))))


@st.composite
def attention_options(draw: Any) -> tuple[Arguments, int]:
    """Of a MultiheadAttention, and how many of query, key and value are given: the others are the one before."""
    heads = draw(SOME)
    options = {"embed_dim": heads * draw(SOME), "num_heads": heads, "dropout": draw(DROPOUT), "dtype": draw(DTYPES)}
    options["bias"] = draw(st.booleans())
    given = draw(SOME)
    if given == 3:
        options |= {"kdim": draw(maybe(SOME)), "vdim": draw(maybe(SOME))}
    return options, given


def widths(options: Arguments) -> dict[str, int]:
    width = options["embed_dim"]
    return {"query": width, "key": options.get("kdim") or width, "value": options.get("vdim") or width}


@st.composite
def multihead_attention(draw: Any) -> Call:
    options, given = draw(attention_options())
    options |= {name: draw(st.booleans()) for name in ("add_bias_kv", "add_zero_attn", "batch_first")}
    batch, queries, keys = (draw(SIZES) for _ in range(3))
    keys = queries if given == 1 else keys
    batched, heads, dtype = draw(st.booleans()), options["num_heads"], options["dtype"]
    samples = (batch,) if batched else ()

    def tokens(steps: int, width: int) -> tuple[int, ...]:
        return (*samples, steps, width) if options["batch_first"] else (steps, *samples, width)

    lengths = {"query": queries, "key": keys, "value": keys}
    names = list(lengths)[:given]
    arguments: Arguments = {name: draw(tensors(tokens(lengths[name], widths(options)[name]), dtype)) for name in names}
    rows = (batch if batched else 1) * heads
    arguments |= {
        "key_padding_mask": draw(maybe(masks(dtype, (*samples, keys)))),
        "need_weights": draw(st.booleans()),
        "attn_mask": draw(maybe(masks(dtype, (queries, keys), (rows, queries, keys)))),
        "average_attn_weights": draw(st.booleans()),
        "is_causal": draw(st.booleans()),
        "key_weights": draw(maybe(weights((*samples, keys), (*samples, heads, keys)))),
        "lengths": draw(maybe(tensors(samples, torch.int64, 0, keys))),
        "query_lengths": draw(maybe(tensors(samples, torch.int32, 0, queries))),
        "seed": draw(maybe(st.integers(0, 2**63 - 1))),
    }
    return ATTENTION, draw(with_options(options, arguments))


@st.composite
def layouts(draw: Any, samples: int) -> mf.PackedLayout:
    return mf.packed_layout(torch.tensor(draw(st.lists(SIZES, min_size=samples, max_size=samples))))


@st.composite
def packed_multihead_attention(draw: Any) -> Call:
    options, given = draw(attention_options())
    samples, heads, dtype = draw(SOME), options["num_heads"], options["dtype"]
    layout_q = draw(layouts(samples))
    layout_k = draw(layouts(samples)) if given > 1 and draw(st.booleans()) else None
    of_keys = layout_q if layout_k is None else layout_k
    totals = {"query": layout_q.total, "key": of_keys.total, "value": of_keys.total}
    names = list(totals)[:given]
    arguments: Arguments = {name: draw(tensors((totals[name], widths(options)[name]), dtype)) for name in names}
    scores = (draw(st.sampled_from([1, samples])), heads, layout_q.max_seqlen, of_keys.max_seqlen)
    arguments |= {
        "layout_q": layout_q,
        "layout_k": layout_k,
        "key_weights": draw(maybe(weights((of_keys.total,), (of_keys.total, heads)))),
        "is_causal": draw(st.booleans()),
        "bias": draw(maybe(tensors(scores, torch.float32))),
        "seed": draw(maybe(st.integers(0, 2**63 - 1))),
    }
    return PACKED_ATTENTION, draw(with_options(options, arguments))


@st.composite
def transformer(draw: Any, function: Callable[..., Any]) -> Call:
    heads, dtype = draw(SOME), draw(DTYPES)
    width, mask = heads * draw(SOME), "src_mask" if function is LAYER else "mask"
    options = {
        "d_model": width,
        "nhead": heads,
        "dim_feedforward": 4,
        "dropout": draw(DROPOUT),
        "activation": draw(st.sampled_from(["relu", "gelu"])),
        "layer_norm_eps": 0.1,  # rows that hardly vary do not make much of rounding
        "dtype": dtype,
        **{name: draw(st.booleans()) for name in ("batch_first", "norm_first", "bias")},
    }
    if function is ENCODER:
        options |= {"num_layers": draw(st.integers(1, 2)), "norm": draw(st.booleans())}
    arguments: Arguments = {"is_causal": draw(st.booleans() if function is LAYER else maybe(st.booleans()))}
    if draw(st.booleans()):
        layout = draw(layouts(draw(SOME)))
        rows, longest = heads * len(layout.lengths), layout.max_seqlen
        arguments |= {
            "src": draw(tensors((layout.total, width), dtype)),
            mask: draw(maybe(masks(dtype, (longest, longest), (rows, longest, longest)))),
            "key_weights": draw(maybe(weights((layout.total,), (layout.total, heads)))),
            "layout": layout,
        }
    else:
        batch, steps, batched = draw(SIZES), draw(SIZES), draw(st.booleans())
        samples, rows = ((batch,), heads * batch) if batched else ((), heads)
        shape = (*samples, steps, width) if options["batch_first"] else (steps, *samples, width)
        arguments |= {
            "src": draw(tensors(shape, dtype)),
            mask: draw(maybe(masks(dtype, (steps, steps), (rows, steps, steps)))),
            "src_key_padding_mask": draw(maybe(masks(dtype, (*samples, steps)))),
            "lengths": draw(maybe(tensors(samples, torch.int64, 0, steps))),
            "key_weights": draw(maybe(weights((*samples, steps), (*samples, heads, steps)))),
        }
    return function, draw(with_options(options, arguments))


MODULE_STRATEGIES: dict[str, st.SearchStrategy[Call]] = {
    "MultiheadAttention": multihead_attention(),
    "MultiheadAttention.forward_packed": packed_multihead_attention(),
    "TransformerEncoderLayer": transformer(LAYER),
    "TransformerEncoder": transformer(ENCODER),
}

"""How far a gradient may be from that of the float64 reference: what rounding can do to it, entry by entry.

Every sum of n rounded terms is off by at most n u times the sum of their absolute values. So a bound is the gradient's
own formula with absolute values in the place of terms that cancel, times ROUNDINGS u. Half types are computed in
float32; what they round besides, the weights p and the output of attention, and the gradient itself, comes on top.

    allowances(function, arguments, upstream, exact) -> {name of an argument: a tensor of its shape}

NaN allows anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from drawn_tensors import Arguments
from torch import Tensor

ROUNDINGS = 64  # more than there are in a row: of products and sums of at most 25 entries, exponentials among them
HALF_ROUNDINGS = 4  # p, the output, a score's gradient and the result
Allowances = dict[str, Tensor]


def unit(dtype: torch.dtype) -> float:
    """u, half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def stored(allowance: Tensor, expected: Tensor, leaf: Tensor) -> Tensor:
    """With the rounding to the leaf's dtype, in which subnormal numbers may count as 0."""
    return allowance + 2 * unit(leaf.dtype) * expected.abs() + torch.finfo(leaf.dtype).smallest_normal


# Soft top-k: ds_i = w_i (g_i - gbar)/tau, dk = gbar = sum w g / sum w, depsilon = -1/epsilon sum w_i (g_i - gbar) t_i


def soft_topk(arguments: Arguments, upstream: Tensor, weights: Tensor) -> Allowances:
    """G = 2 max |g| bounds g_i - gbar, and 1 bounds w_i, w_i |t_i| and the change of both with t_i.

    The offset c of a row is settled up to what changes the sum of the weights by u k, which is u k / sum w. Where the
    choice is hard that is anything, and so is gbar, between the least and the largest g; where the slopes underflow,
    which float32 has none of below 2^-100, gbar is 0.
    """
    scores, epsilon = arguments["scores"], arguments["epsilon"]
    n, u = scores.shape[-1], unit(computed_in(scores.dtype))
    rows = scores.shape[:-1]
    if n == 0:
        return {"k": scores.new_zeros(rows).double(), "epsilon": scores.new_zeros(rows).double()}
    epsilon = torch.as_tensor(epsilon, dtype=torch.float64)
    tau = (0.5 * epsilon * largest_cost(arguments)).expand(rows)
    largest_g = 2 * upstream.double().abs().amax(-1)
    relative = ROUNDINGS * u * n * iterates(arguments, tau)
    slope = (weights * (1 - weights)).clamp(min=0).sum(-1)
    has_slopes = slope > (2.0**-100 if computed_in(scores.dtype) == torch.float32 else 1e-300)
    of_c = (relative * (1 + weights.sum(-1) / slope)).where(has_slopes, 1.0).clamp(max=1)
    usable = (tau > 1e-30) & (tau < 1e30)  # beyond, float32 takes a temperature that it has
    return {
        "scores": (relative * largest_g / tau).where(usable, math.inf)[..., None].expand(scores.shape),
        "epsilon": (relative * largest_g / epsilon).where(usable, math.inf),
        "k": (of_c * largest_g).where(usable, math.inf),
    }


def largest_cost(arguments: Arguments) -> Tensor | float:
    """Z."""
    if arguments["normalizer"] != "max":
        return arguments["normalizer"]
    scores = arguments["scores"].double()
    valid = torch.ones_like(scores, dtype=torch.bool) if arguments["mask"] is None else arguments["mask"]
    if arguments["lengths"] is not None:
        valid = torch.arange(scores.shape[-1]) < arguments["lengths"][..., None]
    cost = torch.maximum(scores.square(), (scores - 1).square())[valid & scores.isfinite()]
    most = cost.max() if cost.numel() else cost.new_zeros(())
    return torch.where(most > 0, most, 1.0)


def iterates(arguments: Arguments, tau: Tensor) -> Tensor:
    """Errors that Sinkhorn's iterates add up: each one that of a score over tau. Newton ends beside the scores."""
    if arguments.get("solver") != "sinkhorn":
        return torch.ones_like(tau)
    largest = arguments["scores"].double().abs().nan_to_num(0, 0, 0).amax(-1)
    return (arguments["iterations"] or 100) * (1 + largest / tau)


# Attention


class Terms(NamedTuple):
    """What a sample's attention is made of, float64; (..., L, D), (..., S, D) and what broadcasts to (..., L, S)."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor  # m
    bias: Tensor  # b
    included: Tensor  # bool
    scale: float
    kept: float  # what dropout multiplies an entry by, at most


def attention_sizes(t: Terms, upstream: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of q, k, v, bias and weights with nothing that cancels; and again, times the size of the scores.

    With X_i the largest sum of |scale q_id k_jd|, |b_ij| and |log m_j|: an error of u X_i in a score is one in p.
    """
    x = (t.scale * t.q @ t.k.mT + t.bias).masked_fill(~t.included, -math.inf)
    of_weights = t.weights.where(t.weights > 0, 1.0).log().abs()
    sizes = (abs(t.scale) * t.q.abs() @ t.k.abs().mT + t.bias.abs() + of_weights).masked_fill(~t.included, 0)
    top = F.pad(x, (0, 1), value=-1e300).amax(-1, keepdim=True)
    e = (x - top).exp()
    total = (t.weights * e).masked_fill(~t.included, 0).sum(-1, keepdim=True)
    e = (e / total).masked_fill((total == 0) | ~t.included, 0)
    p = t.weights * e
    of_p = t.kept * upstream.abs() @ t.v.abs().mT
    slope = of_p + (p * of_p).sum(-1, keepdim=True)
    once = _gradients(t, p, e, slope, upstream)
    times = 1 + F.pad(sizes, (0, 1)).amax(-1, keepdim=True)
    return once, _gradients(t, p * times, e * times, slope, upstream)


def _gradients(t: Terms, p: Tensor, e: Tensor, slope: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    ds = p * slope
    return {
        "q": abs(t.scale) * ds @ t.k.abs(),
        "k": abs(t.scale) * ds.mT @ t.q.abs(),
        "v": t.kept * p.mT @ upstream.abs(),
        "bias": ds,
        "key_weights": (e * slope).sum(-2),
    }


def allowance(sizes: tuple[dict[str, Tensor], dict[str, Tensor]], dtype: torch.dtype) -> Allowances:
    """NaN where terms are beyond the type that is computed in, as those of the faintest keys' weights are."""
    halves = HALF_ROUNDINGS * unit(dtype) if dtype.itemsize == 2 else 0.0
    u, most = ROUNDINGS * unit(computed_in(dtype)), torch.finfo(computed_in(dtype)).max
    return {
        name: (halves * once + u * sizes[1][name]).masked_fill(once > most, math.nan) for name, once in sizes[0].items()
    }


def over(x: Tensor, heads: int) -> Tensor:
    """(..., H, S, D) summed over the query heads that share one of the key heads."""
    return x.unflatten(-3, (heads, -1)).sum(-3)


def masked_attention(arguments: Arguments, upstream: Tensor, _: Tensor) -> Allowances:
    q, k, v = (arguments[name].double() for name in "qkv")
    m, bias, scale = (arguments[name] for name in ("key_weights", "bias", "scale"))
    heads, key_heads = q.shape[1], k.shape[1]
    weights = torch.ones(1, 1, k.shape[2]) if m is None else m[:, None] if m.dim() == 2 else m
    terms = Terms(
        q,
        *(x.repeat_interleave(heads // key_heads, 1) for x in (k, v)),
        weights.double()[:, :, None],
        torch.zeros(1).double() if bias is None else bias.double(),
        included(arguments, weights),
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        1 / (1 - arguments["dropout_p"]),
    )
    found = allowance(attention_sizes(terms, upstream.double()), arguments["q"].dtype)
    found |= {name: over(found[name], key_heads) for name in "kv"}
    shared = m is not None and m.dim() == 2
    return found | ({"key_weights": found["key_weights"].sum(1)} if shared else {})


def included(arguments: Arguments, weights: Tensor) -> Tensor:
    """(B, H, L, S): which key takes part in which query's sum."""
    (batch, heads, queries, _), keys = arguments["q"].shape, arguments["k"].shape[2]
    lengths, query_lengths, mask = (arguments[name] for name in ("lengths", "query_lengths", "mask"))
    taken = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if not arguments["exact_zero_weight_grad"]:
        taken = taken & (weights != 0)[:, :, None]
    if lengths is not None:
        taken = taken & (torch.arange(keys) < lengths[:, None])[:, None, None]
    if query_lengths is not None:
        taken = taken & (torch.arange(queries) < query_lengths[:, None])[:, None, :, None]
    if mask is not None:
        taken = taken & mask[:, None, None]
    return taken.tril() if arguments["causal"] else taken


def packed_attention(arguments: Arguments, upstream: Tensor, out: Tensor) -> Allowances:
    """Sample by sample."""
    queries_end, keys_end = arguments["cu_seqlens_q"], arguments["cu_seqlens_k"]
    ends = [x.tolist() for x in (queries_end, queries_end if keys_end is None else keys_end)]
    options = dict.fromkeys(("key_weights", "bias", "lengths", "query_lengths", "mask", "scale"))
    options |= {"causal": arguments["causal"], "dropout_p": 0.0, "exact_zero_weight_grad": False}
    found = {name: torch.zeros(arguments[name].shape, dtype=torch.float64) for name in "qkv"}
    for of_queries, of_keys in zip(*(map(slice, x[:-1], x[1:]) for x in ends), strict=True):
        places = {"q": of_queries, "k": of_keys, "v": of_keys}
        sample = {name: arguments[name][place].transpose(0, 1)[None] for name, place in places.items()}
        part = masked_attention({**options, **sample}, upstream[of_queries].transpose(0, 1)[None], out)
        for name, place in places.items():
            found[name][place] = part[name][0].transpose(0, 1)
    return found


def scaled_dot_product_attention(arguments: Arguments, upstream: Tensor, _: Tensor) -> Allowances:
    q, *pair = (arguments[name].double() for name in ("query", "key", "value"))
    mask, scale = arguments["attn_mask"], arguments["scale"]
    grouped = arguments["enable_gqa"] and min(x.dim() for x in (q, *pair)) > 2
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in pair) if grouped else pair
    is_bool = mask is not None and mask.dtype == torch.bool
    taken = mask if is_bool else torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    taken = taken.tril() if arguments["is_causal"] else taken
    bias = mask.double() if mask is not None and not is_bool else torch.zeros(1).double()
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    terms = Terms(q, k, v, torch.ones(1).double(), bias, taken, scale, 1.0)
    found = allowance(attention_sizes(terms, upstream.double()), arguments["query"].dtype)
    if grouped:
        found |= {name: over(found[name], x.shape[-3]) for name, x in zip("kv", pair, strict=True)}
    return {"query": found["q"], "key": found["k"], "value": found["v"], "attn_mask": found["bias"]}


# Divergences: differences of log-probabilities, which are at most as large as the logits


def divergence(arguments: Arguments, upstream: Tensor, out: Tensor) -> Allowances:
    p, q = (arguments[name] for name in ("p_logits", "q_logits"))
    u = unit(computed_in(torch.promote_types(p.dtype, q.dtype)))
    reduction = arguments["reduction"]
    means = {"batchmean": math.prod(p.shape[:-1]), "mean": p.numel()}
    largest_g = upstream.double().abs().amax() / means.get(reduction, 1) if upstream.numel() else 0.0
    either = ROUNDINGS * u * largest_g * (1 + p.double().abs() + q.double().abs())
    return dict.fromkeys(("p_logits", "q_logits"), either)


def grad_reverse(arguments: Arguments, upstream: Tensor, out: Tensor) -> Allowances:
    """One product."""
    return {"x": torch.zeros(arguments["x"].shape, dtype=torch.float64)}


def pack(arguments: Arguments, upstream: Tensor, out: Tensor) -> Allowances:
    """Copies: to the bit."""
    return {}


BOUNDS: dict[str, Callable[[Arguments, Tensor, Tensor], Allowances]] = {
    "soft_topk": soft_topk,
    "temporal_mask": soft_topk,
    "masked_attention": masked_attention,
    "packed_attention": packed_attention,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "bernoulli_kl_with_logits": divergence,
    "softmax_kl_with_logits": divergence,
    "grad_reverse": grad_reverse,
    "pack": pack,
}

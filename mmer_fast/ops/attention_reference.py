"""Attention with soft key weights in readable PyTorch, float64 inside: what every backend is compared with.

    p_ij = m_j e^(x_ij) / sum_l m_l e^(x_il),   x_ij = scale q_i . k_j + b_ij
    o_i = sum_j p_ij v_j,                       lse_i = log sum_l m_l e^(x_il)

`attention` is made of plain differentiable operations, so that derivatives of all orders follow. Excluded
keys, padded queries and whatever they hold (NaN too) take no part: they are zeroed before the first product.

Shape suffixes: b batch, h heads of the queries, l queries, s keys, d width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmer_fast.ops.lengths import length_mask
from mmer_fast.ops.philox import attention_keep_mask, dropout_scale


def attention(
    q_bhld: Tensor,
    k_bhsd: Tensor,
    v_bhsd: Tensor,
    key_weights: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    exact_zero_weight_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """The attention output and the log-sum-exp of each query's weighted scores.

    Args:
        q_bhld: (B, H, L, D), floating point.
        k_bhsd, v_bhsd: (B, Hk, S, D) with Hk dividing H: each key head serves H/Hk consecutive query heads.
        key_weights: m, (B, S) or (B, H, S) floating in [0, 1]; None is 1 everywhere. A key of weight 0 is excluded.
        lengths, query_lengths: (B,) integers: the first keys, or queries, of a sample that count.
        mask: (B, S) bool, True at the keys that count.
        bias: b, broadcastable to (B, H, L, S).
        causal: query i sees the keys j <= i, as in `torch.nn.functional.scaled_dot_product_attention`.
        scale: 1/sqrt(D) unless given.
        dropout_p, seed: p times `attention_keep_mask` times `dropout_scale`.
        exact_zero_weight_grad: keys of weight 0 stay in, so that dL/dm is exact there; otherwise it is 0.

    Returns:
        o (B, H, L, D) in the dtype of q; lse (B, H, L) float64. A query without a key, or beyond its length, has o = 0
        and lse = -inf, and gives no gradient.
    """
    t = _terms(q_bhld, k_bhsd, v_bhsd, key_weights, lengths, query_lengths, mask, bias, causal, scale,
               exact_zero_weight_grad)  # fmt: skip
    dropped_bhls = t.p_bhls * _dropout_factor(t.p_bhls, dropout_p, seed)
    return (dropped_bhls @ t.v_bhsd).to(q_bhld.dtype), t.lse_bhl


def attention_gradients(
    grad_out_bhld: Tensor,
    grad_lse_bhl: Tensor | None,
    q_bhld: Tensor,
    k_bhsd: Tensor,
    v_bhsd: Tensor,
    key_weights: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    exact_zero_weight_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `attention`, in closed form; arguments as there.

        dP_ij = r_ij do_i . v_j,   delta_i = sum_j p_ij dP_ij - dlse_i,   a_ij = dP_ij - delta_i,   ds_ij = p_ij a_ij
        dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i r_ij p_ij do_i
        dm_j = sum_i e^(x_ij - lse_i) a_ij,   db_ij = ds_ij

    with r what dropout multiplies p by: 0 or `dropout_scale`, and 1 without it.

    Returns:
        grad_q, grad_k, grad_v in the dtype and shape of q, k, v; the gradient (B, H, S) of each head's own key weights
        and that of the bias in its full shape (B, H, L, S), both float64.
    """
    t = _terms(q_bhld, k_bhsd, v_bhsd, key_weights, lengths, query_lengths, mask, bias, causal, scale,
               exact_zero_weight_grad)  # fmt: skip
    r_bhls = _dropout_factor(t.p_bhls, dropout_p, seed)
    empty_bhl = t.lse_bhl == -torch.inf
    do_bhld = grad_out_bhld.to(torch.float64).masked_fill(empty_bhl[..., None], 0.0)
    dp_bhls = r_bhls * (do_bhld @ t.v_bhsd.transpose(-1, -2))
    delta_bhl = (t.p_bhls * dp_bhls).sum(-1)
    if grad_lse_bhl is not None:
        delta_bhl = delta_bhl - grad_lse_bhl.to(torch.float64).masked_fill(empty_bhl, 0.0)
    a_bhls = dp_bhls - delta_bhl[..., None]
    ds_bhls = t.p_bhls * a_bhls
    e_bhls = (t.x_bhls - t.lse_bhl.masked_fill(empty_bhl, torch.inf)[..., None]).exp()

    factor = q_bhld.shape[-1] ** -0.5 if scale is None else scale
    groups = (k_bhsd.shape[1], q_bhld.shape[1] // k_bhsd.shape[1])
    dk_bhsd = factor * ds_bhls.transpose(-1, -2) @ t.q_bhld
    dv_bhsd = (r_bhls * t.p_bhls).transpose(-1, -2) @ do_bhld
    return (
        (factor * ds_bhls @ t.k_bhsd).to(q_bhld.dtype),
        dk_bhsd.unflatten(1, groups).sum(2).to(k_bhsd.dtype),
        dv_bhsd.unflatten(1, groups).sum(2).to(v_bhsd.dtype),
        (e_bhls * a_bhls).sum(-2),
        ds_bhls,
    )


class _Terms(NamedTuple):
    """What forward and backward share, float64: inputs with zeros where something is excluded, x, p and lse."""

    q_bhld: Tensor
    k_bhsd: Tensor  # for every query head
    v_bhsd: Tensor
    x_bhls: Tensor  # -inf where excluded
    p_bhls: Tensor
    lse_bhl: Tensor


def _terms(
    q_bhld: Tensor,
    k_bhsd: Tensor,
    v_bhsd: Tensor,
    key_weights: Tensor | None,
    lengths: Tensor | None,
    query_lengths: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    exact_zero_weight_grad: bool,
) -> _Terms:
    batch, heads, queries, width = q_bhld.shape
    keys = k_bhsd.shape[2]
    device = q_bhld.device
    valid_bs = torch.ones(batch, keys, dtype=torch.bool, device=device)
    if lengths is not None:
        valid_bs = valid_bs & length_mask(lengths, keys)
    if mask is not None:
        valid_bs = valid_bs & mask
    live_bl = torch.ones(batch, queries, dtype=torch.bool, device=device)
    if query_lengths is not None:
        live_bl = length_mask(query_lengths, queries)

    m_bhs = torch.ones(batch, 1, keys, dtype=torch.float64, device=device)
    if key_weights is not None:
        m_bhs = (key_weights[:, None] if key_weights.dim() == 2 else key_weights).to(torch.float64)
    taken_bhs = valid_bs[:, None].expand(m_bhs.shape)
    if not exact_zero_weight_grad:
        taken_bhs = taken_bhs & (m_bhs != 0)
    m_bhs = m_bhs.masked_fill(~taken_bhs, 0.0)

    q = q_bhld.to(torch.float64).masked_fill(~live_bl[:, None, :, None], 0.0)
    k, v = _expand_heads(k_bhsd, taken_bhs, heads), _expand_heads(v_bhsd, taken_bhs, heads)
    x_bhls = (width**-0.5 if scale is None else scale) * (q @ k.transpose(-1, -2))

    included = (taken_bhs[:, :, None, :] & live_bl[:, None, :, None]).expand(x_bhls.shape)
    if causal:
        included = included & torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
    if bias is not None:
        x_bhls = x_bhls + bias.to(torch.float64).expand(x_bhls.shape).masked_fill(~included, 0.0)
    x_bhls = x_bhls.masked_fill(~included, -torch.inf)

    top_bhl = x_bhls.detach().amax(-1) if keys > 0 else x_bhls.new_full(x_bhls.shape[:-1], -torch.inf)
    top_bhl = top_bhl.masked_fill(top_bhl == -torch.inf, 0.0)  # no key: any shift will do
    e_bhls = m_bhs[:, :, None, :] * (x_bhls - top_bhl[..., None]).exp()
    total_bhl = e_bhls.sum(-1)
    empty_bhl = total_bhl == 0
    p_bhls = (e_bhls / total_bhl.masked_fill(empty_bhl, 1.0)[..., None]).masked_fill(empty_bhl[..., None], 0.0)
    lse_bhl = (total_bhl.masked_fill(empty_bhl, 1.0).log() + top_bhl).masked_fill(empty_bhl, -torch.inf)
    return _Terms(q, k, v, x_bhls, p_bhls, lse_bhl)


def _dropout_factor(p_bhls: Tensor, dropout_p: float, seed: int) -> Tensor:
    """What dropout multiplies p by."""
    if dropout_p == 0:
        return p_bhls.new_ones(())
    batch, heads, queries, keys = p_bhls.shape
    kept = attention_keep_mask(batch, heads, queries, keys, dropout_p, seed, p_bhls.device)
    return kept.to(p_bhls.dtype) * dropout_scale(dropout_p)


def _expand_heads(x_bhsd: Tensor, taken_bhs: Tensor, heads: int) -> Tensor:
    """Key heads repeated for their query heads, float64, with zeros where a key is excluded."""
    repeated = x_bhsd.to(torch.float64).repeat_interleave(heads // x_bhsd.shape[1], dim=1)
    return repeated.masked_fill(~taken_bhs[..., None], 0.0)

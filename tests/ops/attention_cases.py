"""Attention on a backend beside the float64 reference: outputs and all gradients of one case."""

from __future__ import annotations

import math
from typing import Any

import torch
from op_tolerances import ATTENTION, ATTENTION_GRADIENT, ATTENTION_LSE
from torch import Tensor

import mmer_fast as mf
from mmer_fast.ops.attention_reference import attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def qkv(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    key_heads: int,
    queries: int,
    keys: int,
    width: int,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width)]
    q, k, v = (torch.randn(shape).to(device, dtype) for shape in shapes)
    return q, k, v


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """|got - expected| <= tolerance, relative to the largest expected entry or 1."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return
    got, expected = got.detach(), expected.detach()
    size = max(1.0, float(expected.abs().max()))
    error = float((got.double() - expected).abs().nan_to_num(math.inf).max())
    assert error <= tolerance * size, f"error {error:.3g}, allowed {tolerance * size:.3g}"


def check(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rounding: float = 1.0,
    **options: Any,
) -> Tensor:
    """Compares output, lse and the gradients of q, k, v, m and bias with the reference's; returns the output.

    `rounding`: how many times more than usual the scores of this case are rounded.
    """
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (q, k, v, m, bias)]
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (q, k, v, m, bias)]
    out, lse = mf.masked_attention(*leaves[:4], bias=leaves[4], return_lse=True, backend=backend, **options)
    expected, expected_lse = attention(*wide[:4], bias=wide[4], **options)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    close(out, expected, rounding * ATTENTION[q.dtype])
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    live = lse.masked_fill(empty, 0.0), expected_lse.masked_fill(empty, 0.0)
    close(*live, rounding * ATTENTION_LSE[q.dtype])

    cotangents = torch.randn(q.shape).to(out), torch.randn(lse.shape).to(lse)
    loss = (out * cotangents[0]).sum() + (live[0] * cotangents[1]).sum()
    expected_loss = (expected * cotangents[0]).sum() + (live[1] * cotangents[1]).sum()
    given = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(loss, given)
    expected_grads = torch.autograd.grad(expected_loss, [x for x in wide if x is not None])
    for leaf, grad, expected_grad in zip(given, grads, expected_grads, strict=True):
        assert grad.dtype == leaf.dtype
        close(grad, expected_grad, rounding * ATTENTION_GRADIENT[q.dtype])
    return out.detach()


def weights(kind: str, batch: int, heads: int, keys: int, device: str = "cpu") -> Tensor | None:
    """Key weights with some zeros: "none", one for a "sample" or for each "head"."""
    if kind == "none":
        return None
    m = torch.rand((batch, keys) if kind == "sample" else (batch, heads, keys)).to(device)
    return m.masked_fill(m < 0.2, 0.0)

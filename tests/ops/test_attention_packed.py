"""Packed attention is padded attention of the same samples, and dropout drops the same entries in both."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DTYPES, close, weights
from op_tolerances import ATTENTION, ATTENTION_GRADIENT

import mmer_fast as mf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "sample", "head"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.3, "seed": 11}, {"bias": True}], ids=str)
def test_packed_equals_padded(backend, device, interpreted, dtype, kind, options):
    if interpreted and dtype != torch.float32:
        pytest.skip("too slow in the interpreter")
    heads, key_heads, width = 4, 2, 24
    lengths_q, lengths_k = ([9, 0, 1, 17], [20, 3, 0, 33]) if interpreted else ([60, 0, 1, 131], [210, 3, 0, 77])
    queries, keys = (mf.packed_layout(torch.tensor(x, device=device)) for x in (lengths_q, lengths_k))
    q = torch.randn(queries.total, heads, width, device=device).to(dtype).requires_grad_()
    k, v = (torch.randn(keys.total, key_heads, width, device=device).to(dtype).requires_grad_() for _ in range(2))
    inputs = {"q": q, "k": k, "v": v}
    options = dict(options)
    if options.pop("bias", False):
        inputs["bias"] = torch.randn(1, heads, 1, keys.max_seqlen, device=device, requires_grad=True)
    m = weights(kind, 4, heads, keys.total, device)
    if m is not None:
        m = (m[0] if kind == "sample" else m[0].T.contiguous()).requires_grad_()
        inputs["m"] = m
    bias = inputs.get("bias")

    out, lse = mf.packed_attention(
        q, k, v, queries.cu_seqlens, keys.cu_seqlens, max_seqlen_q=queries.max_seqlen, key_weights=m, bias=bias,
        return_lse=True, backend=backend, **options,
    )  # fmt: skip
    padded_m = None if m is None else mf.unpack(m, keys).movedim(1, -1)
    padded, padded_lse = mf.masked_attention(
        mf.unpack(q, queries).transpose(1, 2), mf.unpack(k, keys).transpose(1, 2), mf.unpack(v, keys).transpose(1, 2),
        padded_m, lengths=keys.lengths, query_lengths=queries.lengths, bias=bias, return_lse=True,
        backend="reference", **options,
    )  # fmt: skip
    assert out.shape == q.shape
    assert lse.shape == q.shape[:2]
    expected = mf.pack(padded.transpose(1, 2), queries)
    close(out, expected.double(), ATTENTION[dtype])
    expected_lse = mf.pack(padded_lse.transpose(1, 2), queries)
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    close(lse.masked_fill(lse.isinf(), 0), expected_lse.masked_fill(expected_lse.isinf(), 0).double(), 1e-5)

    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, list(inputs.values()), cotangent)
    expected_grads = torch.autograd.grad(expected, list(inputs.values()), cotangent)
    for got, wanted in zip(grads, expected_grads, strict=True):
        close(got, wanted.double(), ATTENTION_GRADIENT[dtype])


def test_an_upper_bound_of_the_longest_sample_will_do(backend, device):
    layout = mf.packed_layout(torch.tensor([5, 2], device=device))
    x = torch.randn(7, 2, 8, device=device)
    expected = mf.packed_attention(x, x, x, layout.cu_seqlens, backend=backend)
    got = mf.packed_attention(x, x, x, layout.cu_seqlens.long(), max_seqlen_q=100, max_seqlen_k=70, backend=backend)
    close(got, expected.double(), 1e-6)


def test_no_samples(backend, device):
    x = torch.zeros(0, 2, 8, device=device, requires_grad=True)
    out = mf.packed_attention(x, x, x, torch.zeros(1, dtype=torch.int32, device=device), backend=backend)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 2, 8)


def test_without_values_the_bound_is_all_tokens():
    q, ends = torch.randn(5, 2, 4, device="meta"), torch.tensor([0, 2, 5], device="meta")
    assert mf.packed_attention(q, q, q, ends, backend="reference").shape == (5, 2, 4)

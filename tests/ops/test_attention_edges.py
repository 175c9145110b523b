"""Attention where something is missing, not a number, or laid out oddly."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DTYPES, check, close, qkv, weights

import mmer_fast as mf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_may_hold_anything(backend, device, dtype):
    q, k, v = qkv(dtype, 2, 2, 2, 20, 30, 16, device)
    m = torch.rand(2, 30, device=device)
    m[0, 3] = 0
    options = {"lengths": torch.tensor([30, 11], device=device), "query_lengths": torch.tensor([20, 5], device=device)}
    cotangent = torch.randn(q.shape, device=device).to(dtype)

    def run() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, m)]
        out = mf.masked_attention(*leaves, backend=backend, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]

    expected = run()
    for x in (k, v):
        x[0, :, 3] = math.nan
        x[1, :, 11:] = math.inf
    q[1, :, 5:] = math.nan
    cotangent[1, :, 5:] = math.nan
    m[1, 11:] = math.nan
    for got, wanted in zip(run(), expected, strict=True):
        # The reference multiplies with BLAS, whose sums depend on where its operands lie.
        assert torch.equal(got, wanted) if backend != "reference" else torch.allclose(got, wanted)
    assert (expected[0][1, :, 5:] == 0).all()
    assert (expected[1][1, :, 5:] == 0).all()
    assert (expected[2][1, :, 11:] == 0).all()


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_nan_that_counts_is_seen(backend, device, which):
    tensors = dict(zip("qkv", qkv(torch.float32, 1, 1, 1, 3, 5, 8, device), strict=True))
    tensors[which][0, 0, 2, 1] = math.nan
    assert mf.masked_attention(**tensors, backend=backend)[0, 0, 2].isnan().any()


def test_rows_without_a_key(backend, device):
    q, k, v = (x.requires_grad_() for x in qkv(torch.float32, 2, 1, 1, 4, 6, 8, device))
    mask = torch.ones(2, 6, dtype=torch.bool, device=device)
    mask[1] = False
    out, lse = mf.masked_attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    grads = torch.autograd.grad(out, (q, k, v), torch.full_like(out, math.nan).where(out == 0, 1.0))
    for grad in grads:
        assert (grad[1] == 0).all()
        assert grad[0].isfinite().all()


def test_strided_and_offset_views(backend, device, interpreted):
    length = 20 if interpreted else 70
    base = torch.randn(3, length, 3, 2, 17, device=device)
    q, k, v = (base[:, :, i, :, 1:].transpose(1, 2) for i in range(3))
    m = torch.rand(3, 2 * length, device=device)[:, ::2]
    check(backend, q, k, v, m)
    check(backend, q, k.transpose(2, 3).contiguous().transpose(2, 3), v, m.expand(2, 3, -1).transpose(0, 1))


def test_few_heads_with_many_keys(backend, device, interpreted):
    """The CPU cuts queries and keys of few heads into chunks."""
    queries, keys = (40, 70) if interpreted else (500, 1900)
    q, k, v = qkv(torch.float32, 1, 2, 1, queries, keys, 16, device)
    live = torch.tensor([queries - 11], device=device)
    check(backend, q, k, v, weights("head", 1, 2, keys, device), causal=True, query_lengths=live, rounding=2.0)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    bias = torch.randn(1, 1, queries, keys, device=device)
    check(backend, q, k, v, None, bias, lengths=torch.tensor([keys - 30], device=device))


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 5, 4), (2, 2, 0, 5, 4), (2, 2, 3, 0, 4), (2, 0, 3, 5, 4)], ids=["B", "L", "S", "H"]
)
def test_empty(backend, device, shape):
    batch, heads, queries, keys, width = shape
    key_heads = 1 if heads == 0 else heads
    q = torch.zeros(batch, heads, queries, width, device=device, requires_grad=True)
    k = torch.zeros(batch, key_heads, keys, width, device=device, requires_grad=True)
    m = torch.rand(batch, keys, device=device, requires_grad=True)
    bias = torch.zeros(1, 1, 1, keys, device=device, requires_grad=True)
    out, lse = mf.masked_attention(q, k, k, m, bias=bias, return_lse=True, backend=backend)
    assert out.shape == q.shape
    assert (lse == -math.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, m, bias))
    for grad, leaf in zip(grads, (q, k, m, bias), strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()


def test_outputs_of_a_single_key_are_its_value(backend, device):
    q, k, v = qkv(torch.float32, 2, 2, 1, 3, 1, 8, device)
    out, lse = mf.masked_attention(
        q, k, v, torch.full((2, 1), 0.25, device=device), return_lse=True, scale=0.0, backend=backend
    )
    close(out, v.expand(2, 2, 3, 8).double(), 1e-7)
    close(lse, torch.full((2, 2, 3), math.log(0.25), dtype=torch.float64, device=device), 1e-6)


def test_runs_are_bitwise_equal(backend, device, interpreted):
    length = 20 if interpreted else 300
    q, k, v = (x.requires_grad_() for x in qkv(torch.float32, 2, 4, 2, length, length, 32, device))
    m = torch.rand(2, length, device=device, requires_grad=True)
    bias = torch.randn(1, 1, length, length, device=device, requires_grad=True)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out = mf.masked_attention(q, k, v, m, bias=bias, dropout_p=0.1, seed=3, backend=backend)
        runs.append([out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v, m, bias))])
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_lengths_beyond_the_tensor_mean_all_of_it(backend, device):
    """Where they cannot be read, on a GPU or in a compiled graph, they must not reach beyond the memory."""
    from mmer_fast.ops.attention_operators import FORWARD, SUFFIX

    q, k, v = qkv(torch.float32, 1, 1, 1, 3, 5, 8, device)
    many = torch.tensor([10**6], device=device)
    out, _ = FORWARD[SUFFIX[backend]](
        q, k, v, None, None, None, many, many, None, None, 3, 5, False, 0.3, 0.0, None, False
    )
    close(out, mf.masked_attention(q, k, v, scale=0.3, backend=backend).double(), 1e-7)


@pytest.mark.parametrize("least", [1e-37, 1e-25])
def test_keys_of_faint_weights_alone(backend, device, least):
    """Sums of e^x as small as their weights have reciprocals that float32 has not, or products that it has not."""
    q, k, v = qkv(torch.float32, 2, 2, 2, 5, 9, 8, device)
    m = (least * (1 + 99 * torch.rand(2, 9))).to(device)
    check(backend, q, k, v, m, rounding=4)  # a score has the weight's power of two


@pytest.mark.parametrize("faint", [1e-42, 1e-37, 1e-25])
def test_a_query_that_sees_faint_keys_alone(backend, device, faint):
    q, k, v = (x.double() for x in qkv(torch.float32, 1, 2, 2, 6, 6, 8, device))
    m = torch.tensor([[faint, faint, 1.0, faint, 0.5, 0.0]], device=device)
    grad = torch.randn(1, 2, 6, 8, dtype=torch.float64, device=device)

    def results(dtype, chosen):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = mf.masked_attention(*leaves, m, causal=True, return_lse=True, backend=chosen)
        return out, lse, *torch.autograd.grad(out, leaves, grad.to(dtype))

    for got, expected in zip(results(torch.float32, backend), results(torch.float64, "reference"), strict=True):
        close(got, expected, 1e-5)

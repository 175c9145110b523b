"""The attention reference against sums written out, torch's own attention, and finite differences."""

from __future__ import annotations

import math

import attention_oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.ops.attention_reference import attention
from mmer_fast.ops.philox import attention_keep_mask, philox4x32

DOUBLE = torch.float64


def tensors(batch: int, heads: int, key_heads: int, queries: int, keys: int, width: int) -> tuple[Tensor, ...]:
    shapes = [(batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width)]
    return tuple(torch.randn(shape, dtype=DOUBLE) for shape in shapes)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 5), (5, 3)])
def test_equals_the_sums_written_out(queries, keys, heads, key_heads, causal, per_head):
    q, k, v = tensors(2, heads, key_heads, queries, keys, 3)
    m = torch.rand((2, heads, keys) if per_head else (2, keys), dtype=DOUBLE)
    m[0, ..., 0] = 0
    lengths, query_lengths = torch.tensor([keys, keys - 1]), torch.tensor([queries, queries - 1])
    b = torch.randn(2, 1, queries, keys, dtype=DOUBLE)
    out, lse = attention(
        q, k, v, m, lengths=lengths, query_lengths=query_lengths, bias=b, causal=causal, scale=0.7
    )  # fmt: skip

    def weight(sample, head, j):
        return 0.0 if j >= lengths[sample] else float(m[sample, head, j] if per_head else m[sample, j])

    def bias(sample, head, i, j):
        hidden = i >= query_lengths[sample] or (causal and j > i)
        return -math.inf if hidden else float(b[sample, 0, i, j])

    expected, expected_lse = attention_oracle.attention(q.numpy(), k.numpy(), v.numpy(), weight, bias, 0.7)
    assert (out - torch.from_numpy(expected)).abs().max() <= 1e-13
    assert torch.equal(lse == -math.inf, torch.from_numpy(expected_lse) == -math.inf)
    assert (lse.exp() - torch.from_numpy(expected_lse).exp()).abs().max() <= 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch(causal):
    q, k, v = tensors(2, 3, 3, 6, 6, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert (attention(q, k, v, causal=causal)[0] - expected).abs().max() <= 1e-13
    mask = torch.rand(2, 6) > 0.3
    mask[:, 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    assert (attention(q, k, v, mask=mask)[0] - expected).abs().max() <= 1e-13
    m = torch.rand(2, 6, dtype=DOUBLE)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=m.log()[:, None, None])
    assert (attention(q, k, v, m)[0] - expected).abs().max() <= 1e-13


def test_large_scores_do_not_overflow():
    q, k, v = tensors(1, 1, 1, 4, 4, 8)
    out, lse = attention(1e3 * q, 1e3 * k, v)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_padding_may_hold_anything_and_gets_no_gradient():
    q, k, v = (x.requires_grad_() for x in tensors(2, 2, 2, 4, 5, 3))
    m = torch.rand(2, 5, dtype=DOUBLE)
    m[1, 1] = 0
    lengths, query_lengths = torch.tensor([3, 5]), torch.tensor([4, 2])
    options = {"lengths": lengths, "query_lengths": query_lengths}
    expected, _ = attention(q, k, v, m, **options)
    with torch.no_grad():
        for x in (k, v):
            x[0, :, 3:] = math.nan
            x[1, :, 1] = math.inf
        q[1, :, 2:] = math.nan
    weights = m.clone()
    weights[0, 3:] = math.nan
    weights.requires_grad_()
    out, _ = attention(q, k, v, weights, **options)
    assert torch.equal(out, expected)
    assert not out[1, :, 2:].any()
    gradients = torch.autograd.grad(out, (q, k, v, weights), torch.randn_like(out))
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][1, :, 2:].any()
    for g in gradients[1:3]:
        assert not g[0, :, 3:].any()
        assert not g[1, :, 1].any()
    assert not gradients[3][0, 3:].any()
    assert gradients[3][1, 1] == 0


@pytest.mark.parametrize("exact", [False, True])
def test_a_query_without_a_key(exact):
    q, k, v = (x.requires_grad_() for x in tensors(2, 1, 1, 2, 3, 3))
    m = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 1.0]], dtype=DOUBLE, requires_grad=True)
    out, lse = attention(q, k, v, m, exact_zero_weight_grad=exact)
    assert not out[0].any()
    assert (lse[0] == -math.inf).all()
    for g in torch.autograd.grad(out.sum(), (q, k, v, m), retain_graph=True):
        assert g.isfinite().all()
        assert not g[0].any()


def test_the_gradient_at_weight_zero():
    q, k, v = tensors(1, 1, 1, 3, 4, 3)
    grad = torch.randn(1, 1, 3, 3, dtype=DOUBLE)

    def gradient(first, exact):
        m = torch.tensor([[first, 0.3, 0.6, 1.0]], dtype=DOUBLE, requires_grad=True)
        out, _ = attention(q, k, v, m, exact_zero_weight_grad=exact)
        return torch.autograd.grad(out, m, grad)[0]

    assert gradient(0.0, exact=False)[0, 0] == 0
    assert (gradient(0.0, exact=True) - gradient(1e-9, exact=False)).abs().max() <= 1e-7
    assert torch.equal(gradient(0.0, exact=True)[0, 1:], gradient(0.0, exact=False)[0, 1:])


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_derivatives(check):
    q, k, v = tensors(1, 2, 1, 2, 3, 2)
    m, bias = torch.rand(1, 3, dtype=DOUBLE) + 0.1, torch.randn(1, 1, 2, 3, dtype=DOUBLE)
    inputs = tuple(x.requires_grad_() for x in (q, k, v, m, bias))

    def function(q, k, v, m, bias):
        return attention(q, k, v, m, bias=bias, causal=True, dropout_p=0.3, seed=7, lengths=torch.tensor([2]))

    assert check(function, inputs)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_empty(queries, keys):
    q, k, v = (x.requires_grad_() for x in tensors(2, 2, 2, queries, keys, 4))
    out, lse = attention(q, k, v)
    assert out.shape == (2, 2, queries, 4)
    assert not out.any()
    assert (lse == -math.inf).all()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


class TestPhilox:
    # Known answers of the published implementation, Random123 (kat_vectors, philox4x32 7).
    ANSWERS = (
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    )

    @pytest.mark.parametrize(("counter", "key", "expected"), ANSWERS)
    def test_known_answers(self, counter, key, expected):
        words = philox4x32(tuple(torch.tensor(word) for word in counter), key)
        assert tuple(int(word) for word in words) == expected

    def test_dropout_keeps_its_share_and_depends_on_positions_alone(self):
        def keep(batch, heads, queries, keys, seed=3):
            return attention_keep_mask(batch, heads, queries, keys, 0.3, seed, torch.device("cpu"))

        large = keep(3, 2, 50, 61)
        assert abs(float(large.double().mean()) - 0.7) < 0.01
        assert torch.equal(keep(2, 1, 7, 9), large[:2, :1, :7, :9])
        assert not torch.equal(keep(3, 2, 50, 61, seed=4), large)

    def test_dropped_attention_is_unbiased(self):
        q, k, v = tensors(1, 1, 1, 2, 3, 2)
        kept = torch.stack([attention(q, k, v, dropout_p=0.5, seed=seed)[0] for seed in range(2000)])
        assert (kept.mean(0) - attention(q, k, v)[0]).abs().max() < 0.15

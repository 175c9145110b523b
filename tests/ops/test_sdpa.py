"""scaled_dot_product_attention against PyTorch's function of this name, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mmer_fast as mf
from mmer_fast.ops.sdpa import mask_and_bias, scaled_dot_product_attention

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _reference():
    with mf.use_backend("reference"):
        yield


def randn(*shape):
    return torch.randn(shape, dtype=DOUBLE)


def check(q, k, v, attn_mask=None, **options):
    """Values and gradients are those of PyTorch's function."""
    floating = attn_mask is not None and attn_mask.is_floating_point()
    inputs = [q, k, v, attn_mask] if floating else [q, k, v]
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        mask = leaves[3] if floating else attn_mask
        out = function(*leaves[:3], mask, **options)
        results.append((out, torch.autograd.grad(out, leaves, torch.cos(torch.arange(out.numel()).reshape(out.shape)))))
    (ours, our_grads), (theirs, their_grads) = results
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-13
    for a, b in zip(our_grads, their_grads, strict=True):
        assert (a - b).abs().max() <= 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("query", "key"),
    [
        ((5, 8), (6, 8)),
        ((3, 5, 8), (3, 6, 8)),
        ((2, 3, 5, 8), (2, 3, 4, 8)),
        ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8)),
        ((2, 4, 5, 8), (1, 4, 6, 8)),
        ((2, 4, 5, 8), (4, 6, 8)),
        ((4, 5, 8), (2, 4, 6, 8)),
        ((2, 4, 5, 8), (2, 1, 6, 8)),
        ((2, 1, 5, 8), (2, 4, 6, 8)),
        ((2, 4, 1, 1), (2, 4, 1, 1)),
    ],
)
def test_shapes(query, key, causal):
    check(randn(*query), randn(*key), randn(*key), is_causal=causal)


@pytest.mark.parametrize("out_width", [1, 5, 11])
def test_a_value_width_of_its_own(out_width):
    check(randn(2, 3, 5, 8), randn(2, 3, 6, 8), randn(2, 3, 6, out_width))
    check(randn(5, 8), randn(6, 8), randn(6, out_width), scale=0.3)


def test_queries_without_width():
    value = randn(2, 3, 6, 4)
    out = scaled_dot_product_attention(randn(2, 3, 5, 0), randn(2, 3, 6, 0), value)
    torch.testing.assert_close(out, value.mean(-2, keepdim=True).expand_as(out))


@pytest.mark.parametrize(
    "shape",
    [
        (5, 6),
        (1, 6),
        (5, 1),
        (4, 5, 6),
        (4, 1, 6),
        (2, 1, 1, 6),
        (2, 1, 5, 6),
        (1, 4, 5, 6),
        (2, 4, 5, 6),
        (1, 1, 5, 1),
    ],
)
@pytest.mark.parametrize("floating", [False, True])
def test_masks(shape, floating):
    q, k, v = randn(2, 4, 5, 8), randn(2, 4, 6, 8), randn(2, 4, 6, 8)
    mask = torch.rand(shape) > 0.4
    check(q, k, v, randn(*shape) if floating else mask)


@pytest.mark.parametrize(
    "shape", [(5, 6), (4, 5, 6), (3, 1, 1, 6), (2, 1, 1, 1, 6), (1, 3, 4, 1, 6), (2, 1, 1, 5, 6), (2, 3, 4, 5, 6)]
)
@pytest.mark.parametrize("floating", [False, True])
def test_masks_with_more_leading_dimensions(shape, floating):
    q, k, v = randn(2, 3, 4, 5, 8), randn(2, 3, 4, 6, 8), randn(2, 3, 4, 6, 8)
    check(q, k, v, randn(*shape) if floating else torch.rand(shape) > 0.4)


@pytest.mark.parametrize(("query", "key"), [((5, 8), (6, 8)), ((4, 5, 8), (4, 6, 8))])
@pytest.mark.parametrize("floating", [False, True])
def test_masks_without_a_batch(query, key, floating):
    check(randn(*query), randn(*key), randn(*key), randn(5, 6) if floating else torch.rand(5, 6) > 0.4)


def test_infinite_entries_and_hidden_rows():
    q, k, v = randn(2, 4, 5, 8), randn(2, 4, 6, 8), randn(2, 4, 6, 8)
    mask = torch.rand(5, 6) > 0.5
    mask[1] = False
    for given in (mask, torch.zeros(5, 6, dtype=DOUBLE).masked_fill(~mask, -torch.inf)):
        out = scaled_dot_product_attention(q, k, v, given)
        assert not out[:, :, 1].any()
        assert (out - F.scaled_dot_product_attention(q, k, v, given)).abs().max() <= 1e-13


@pytest.mark.parametrize(("heads", "key_heads", "value_heads"), [(4, 2, 2), (4, 1, 1), (6, 3, 3), (4, 4, 2), (4, 1, 2)])
def test_grouped_heads(heads, key_heads, value_heads):
    check(randn(2, heads, 5, 8), randn(2, key_heads, 6, 8), randn(2, value_heads, 6, 8), enable_gqa=True)


class TestWhatAMaskBecomes:
    """Keys that exist cost nothing where they do not; a bias is read."""

    def test_the_same_keys_for_every_query(self):
        keys = torch.rand(2, 6) > 0.5
        row = keys[:, None, None]
        for given in (row, row.expand(2, 4, 5, 6), row.expand(2, 1, 5, 6)):
            mask, bias = mask_and_bias(given, (2, 4, 5, 6))
            assert bias is None
            assert torch.equal(mask, keys)
        mask, bias = mask_and_bias(keys[0, None], (2, 4, 5, 6))
        assert bias is None
        assert torch.equal(mask, keys[:1].expand(2, 6))

    @pytest.mark.parametrize(
        ("shape", "wanted"),
        [((5, 6), (1, 1, 5, 6)), ((4, 1, 6), (1, 4, 1, 6)), ((2, 1, 5, 6), (2, 1, 5, 6)), ((5, 1), (1, 1, 5, 6))],
    )
    def test_a_bias_keeps_its_broadcast_dimensions(self, shape, wanted):
        for given in (torch.rand(shape) > 0.5, torch.randn(shape)):
            mask, bias = mask_and_bias(given, (2, 4, 5, 6))
            assert mask is None
            assert bias.shape == wanted
        mask, bias = mask_and_bias(torch.randn(shape).expand(2, 4, 5, 6), (2, 4, 5, 6))
        assert bias.shape[1:] == wanted[1:]

    def test_every_entry_of_an_expanded_leaf_has_its_own_gradient(self):
        q, k, v = randn(2, 4, 5, 8), randn(2, 4, 6, 8), randn(2, 4, 6, 8)
        expanded = torch.randn(4, 1, 6).expand(4, 5, 6).requires_grad_()
        whole = expanded.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        gradients = [
            torch.autograd.grad(scaled_dot_product_attention(q, k, v, bias).square().sum(), bias)[0]
            for bias in (expanded, whole)
        ]
        assert torch.equal(*gradients)

    def test_hidden_keys_may_hold_anything(self):
        q, k, v = randn(2, 4, 5, 8), randn(2, 4, 6, 8), randn(2, 4, 6, 8)
        keys = torch.tensor([[True] * 4 + [False] * 2, [False] + [True] * 5])
        expected = scaled_dot_product_attention(q, k, v, keys[:, None, None])
        k, v = (x.masked_fill(~keys[:, None, :, None], torch.nan).requires_grad_() for x in (k, v))
        out = scaled_dot_product_attention(q, k, v, keys[:, None, None])
        assert torch.equal(out, expected)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (k, v)))


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("per_head", [False, True])
def test_key_weights_are_a_bias_of_their_logarithm(leading, per_head):
    q, k, v = randn(*leading, 4, 5, 8), randn(*leading, 4, 6, 8), randn(*leading, 4, 6, 8)
    m = torch.rand(*leading, *((4, 6) if per_head else (6,)), dtype=DOUBLE).requires_grad_()
    out = scaled_dot_product_attention(q, k, v, key_weights=m)
    logarithm = m.log().unsqueeze(-2) if per_head else m.log()[..., None, None, :]
    expected = F.scaled_dot_product_attention(q, k, v, logarithm)
    assert (out - expected).abs().max() <= 1e-13
    grads = (torch.autograd.grad(x, m, torch.ones_like(x).cumsum(-1))[0] for x in (out, expected))
    assert torch.sub(*grads).abs().max() <= 1e-12


def test_dropout():
    q, k = randn(1, 2, 40, 8), randn(1, 2, 50, 8)
    v = torch.ones(1, 2, 50, 1, dtype=DOUBLE)
    out = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        out.append(scaled_dot_product_attention(0 * q, k, v, dropout_p=0.25))
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])
    # 4000 weights of 1/50 each, kept with probability 3/4 and divided by it: five standard deviations of the mean.
    assert abs(float(out[0].mean()) - 1) < 5 * (0.25 / 0.75 / 4000) ** 0.5


def test_compiles_without_a_graph_break():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 4)
    keys, added = torch.rand(2, 1, 1, 6) > 0.3, torch.randn(5, 6)

    def both(q, k, v):
        a = scaled_dot_product_attention(q, k, v, keys, enable_gqa=True)
        return a + scaled_dot_product_attention(q, k, v, added, enable_gqa=True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), both(q, k, v))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "attn_mask and is_causal are alternatives", {"attn_mask": torch.ones(5, 6), "is_causal": True}),
        (TypeError, "attn_mask must be a bool or .* got torch.int64", {"attn_mask": torch.ones(5, 6).long()}),
        (ValueError, r"attn_mask must have at least two dimensions .* got \(6,\)", {"attn_mask": torch.ones(6)}),
        (ValueError, r"broadcast to \(..., H, L, S\) = \(2, 4, 5, 6\), got \(5, 7\)", {"attn_mask": torch.ones(5, 7)}),
        (ValueError, r"got \(1, 2, 4, 5, 6\)", {"attn_mask": torch.ones(1, 2, 4, 5, 6)}),
        (TypeError, "key must have the dtype torch.float64 of query", {"key": torch.ones(2, 4, 6, 8)}),
        (ValueError, "key must have the head width 8 of query, got 7", {"key": randn(2, 4, 6, 7)}),
        (ValueError, "value must have the length 6 of key, got 5", {"value": randn(2, 4, 5, 8)}),
        (ValueError, "query must have at least two dimensions", {"query": randn(8)}),
        (ValueError, "leading dimensions that broadcast", {"value": randn(3, 4, 6, 8)}),
        (ValueError, r"enable_gqa=True .* got \(4, 2, 2\)", {"key": randn(2, 2, 6, 8), "value": randn(2, 2, 6, 8)}),
        (ValueError, r"divide the 4 of query, got \(3, 4\)", {"key": randn(2, 3, 6, 8), "enable_gqa": True}),
        (ValueError, r"key_weights must have shape .* = \(2, 6\) or .* got \(6,\)", {"key_weights": torch.ones(6)}),
        (ValueError, r"dropout_p must be within \[0, 1\), got 1", {"dropout_p": 1.0}),
    ],
)
def test_errors(error, message, change):
    arguments = {"query": randn(2, 4, 5, 8), "key": randn(2, 4, 6, 8), "value": randn(2, 4, 6, 8)}
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**(arguments | change))

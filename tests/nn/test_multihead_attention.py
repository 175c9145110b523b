"""MultiheadAttention against PyTorch's class, in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from attention_twins import DOUBLE, E, H, L, N, S, check, inputs, padding, pair

from mmer_fast import nn

NEEDS = [
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
]


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 6, "vdim": 3},
        {"kdim": 6, "bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 3},
        {"num_heads": 1},
        {"num_heads": 8},
    ],
    ids=str,
)
class TestEqualsTorch:
    def test_without_masks(self, options, batch_first, needs):
        tensors = inputs(batch_first, options.get("kdim", E), options.get("vdim", E))
        check(pair(batch_first=batch_first, **options), tensors, **needs)

    def test_with_masks(self, options, batch_first, needs):
        modules = pair(batch_first=batch_first, **options)
        tensors = inputs(batch_first, options.get("kdim", E), options.get("vdim", E))
        heads = modules[0].num_heads
        hidden = torch.rand(N * heads, L, S) > 0.6
        hidden[..., 1] = False
        check(modules, tensors, key_padding_mask=padding(), attn_mask=hidden, **needs)
        check(
            modules,
            tensors,
            key_padding_mask=torch.randn(N, S, dtype=DOUBLE),
            attn_mask=torch.randn(L, S, dtype=DOUBLE),
            **needs,
        )


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs_that_are_one_tensor(batch_first, needs):
    modules = pair(batch_first=batch_first)
    query, key, _ = inputs(batch_first)
    check(modules, [key], same=(0, 0, 0), key_padding_mask=padding(), **needs)
    check(modules, [query, key], same=(0, 1, 1), **needs)
    check(modules, [key, torch.randn_like(key)], same=(0, 0, 1), **needs)


def test_self_attention_is_one_product(monkeypatch):
    module, _ = pair()
    shapes, real = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: shapes.append(tuple(w.shape)) or real(x, w, b)
    )
    query, key, _ = inputs()
    module(key, key, key, need_weights=False)
    module(query, key, key, need_weights=False)
    assert shapes == [(3 * E, E), (E, E), (2 * E, E), (E, E), (E, E)]


@pytest.mark.parametrize("needs", NEEDS)
def test_without_a_batch(needs):
    modules, tensors = pair(), inputs(batched=False)
    check(modules, tensors, **needs)
    check(modules, tensors, key_padding_mask=padding()[0], attn_mask=torch.rand(H, L, S) > 2, **needs)
    check(modules, tensors, attn_mask=torch.randn(L, S, dtype=DOUBLE), **needs)


@pytest.mark.parametrize("appended", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("padded", [False, True])
def test_causal(padded, appended):
    modules = pair(**appended)
    x = torch.randn(S, N, E, dtype=DOUBLE)
    later = torch.ones(S, S, dtype=torch.bool).triu(1)
    mask = padding() if padded else None
    if mask is not None:
        mask[:, 0] = False
    for need in (False, True):
        check(modules, [x], same=(0, 0, 0), attn_mask=later, key_padding_mask=mask, need_weights=need)
    expected, their_weights = modules[1](x, x, x, attn_mask=later, key_padding_mask=mask)
    for given in (None, later):
        out, weights = modules[0](x, x, x, attn_mask=given, is_causal=True, key_padding_mask=mask)
        assert (out - expected).abs().max() <= 1e-12
        assert (weights - their_weights).abs().max() <= 1e-12


def test_state_dicts_and_initialisation():
    for options in ({}, {"kdim": 6, "add_bias_kv": True}, {"bias": False}):
        torch.manual_seed(7)
        ours = nn.MultiheadAttention(E, H, **options)
        torch.manual_seed(7)
        theirs = torch.nn.MultiheadAttention(E, H, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        theirs.load_state_dict(ours.state_dict(), strict=True)


def test_copies():
    module, _ = pair(batch_first=True)
    tensors = inputs(batch_first=True)
    expected = module(*tensors)[0]
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(*tensors)[0], expected)


def test_asking_for_weights_changes_no_bit_of_the_output():
    module, _ = pair(dropout=0.4)
    tensors = inputs()
    outs = []
    for need in (True, False):
        torch.manual_seed(5)
        outs.append(module(*tensors, need_weights=need)[0])
    assert torch.equal(*outs)


def test_compiles_without_a_graph_break():
    module = nn.MultiheadAttention(E, H, batch_first=True, dropout=0.3)
    x, mask = torch.randn(N, S, E), padding()

    def both(x):
        out, weights = module(x, x, x, key_padding_mask=mask, seed=3)
        return out.sum() + weights.square().sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x), list(module.parameters())) for f in (compiled, both)]
    torch.testing.assert_close(*grads)


def test_autocast():
    module = nn.MultiheadAttention(E, H, batch_first=True, add_bias_kv=True)
    tensors = [x.float() for x in inputs(batch_first=True)]
    expected = module(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = module(*tensors)
    assert out.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected[0], atol=0.03, rtol=0.03)
    torch.testing.assert_close(weights, expected[1], atol=0.03, rtol=0.03)


def test_meta_device():
    module = nn.MultiheadAttention(E, H, batch_first=True, device="meta")
    out, weights = module(*(x.float().to("meta") for x in inputs(batch_first=True)))
    assert (out.shape, weights.shape) == ((N, L, E), (N, L, S))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "query must have two or three dimensions", {"query": torch.ones(E)}),
        (ValueError, r"key must have the 3 dimensions of query and width 8", {"key": torch.ones(S, N, 7)}),
        (ValueError, r"value must have the length and batch size of key, \(5, 3\)", {"value": torch.ones(4, N, E)}),
        (ValueError, "key must have the batch size 3 of query", dict.fromkeys(("key", "value"), torch.ones(S, 2, E))),
        (TypeError, "key_padding_mask must be a bool or floating", {"key_padding_mask": torch.ones(N, S).int()}),
        (ValueError, r"key_padding_mask must have shape \(N, S\) = \(3, 5\)", {"key_padding_mask": torch.ones(S, N)}),
        (ValueError, r"attn_mask must have shape \(L, S\) = \(4, 5\) or", {"attn_mask": torch.ones(S, L)}),
        (ValueError, r"\(N H, L, S\) = \(6, 4, 5\), got \(3, 4, 5\)", {"attn_mask": torch.ones(N, L, S)}),
    ],
)  # fmt: skip
def test_errors(error, message, change):
    arguments = {"query": torch.ones(L, N, E), "key": torch.ones(S, N, E), "value": torch.ones(S, N, E)}
    with pytest.raises(error, match=message):
        nn.MultiheadAttention(E, H)(**(arguments | change))

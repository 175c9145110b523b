"""TransformerEncoderLayer and TransformerEncoder against PyTorch's classes, in float64, at the tokens."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from transformer_twins import (
    DOUBLE,
    LATER,
    LENGTHS,
    NONE,
    SCATTERED,
    SUFFIX,
    B,
    E,
    H,
    T,
    batch,
    check,
    layers,
    stacks,
)

import mmer_fast as mf
from mmer_fast import nn


@pytest.mark.parametrize("make", [layers, stacks])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
class TestEqualsTorch:
    @pytest.mark.parametrize("padding", [None, NONE, SUFFIX, SCATTERED], ids=["none", "empty", "suffix", "scattered"])
    def test_bool_masks(self, padding, norm_first, batch_first, make):
        modules, x = make(norm_first=norm_first, batch_first=batch_first), batch(batch_first)
        check(modules, x, padding)
        check(modules, x, padding, LATER)
        hidden = torch.rand(T, T) > 0.6
        hidden.fill_diagonal_(False)
        check(modules, x, padding, hidden)
        hidden = torch.rand(B * H, T, T) > 0.6
        hidden.diagonal(dim1=1, dim2=2).fill_(False)
        check(modules, x, padding, hidden)

    def test_floating_masks(self, norm_first, batch_first, make):
        modules, x = make(norm_first=norm_first, batch_first=batch_first), batch(batch_first)
        added, of_keys = torch.randn(T, T, dtype=DOUBLE), torch.randn(B, T, dtype=DOUBLE)
        check(modules, x, None, added)
        check(modules, x, of_keys)
        check(modules, x, of_keys, added)
        later = torch.zeros(T, T, dtype=DOUBLE).masked_fill(LATER, -torch.inf)
        check(modules, x, of_keys, later)

    def test_lengths(self, norm_first, batch_first, make):
        modules, x = make(norm_first=norm_first, batch_first=batch_first), batch(batch_first)
        check(modules, x, our_options={"lengths": LENGTHS}, their_padding=SUFFIX)
        check(modules, x, SCATTERED, our_options={"lengths": LENGTHS}, their_padding=SCATTERED | SUFFIX)
        check(modules, x, our_options={"lengths": LENGTHS, "is_causal": True}, their_padding=SUFFIX, their_mask=LATER)

    def test_key_weights(self, norm_first, batch_first, make):
        """Of the heads or shared: PyTorch's attention with their logarithm for a mask."""
        ours, theirs = make(norm_first=norm_first, batch_first=batch_first)
        x = batch(batch_first)
        for shape, padding in (((B, T), SUFFIX), ((B, H, T), SCATTERED), ((B, H, T), NONE)):
            m = torch.rand(shape, dtype=DOUBLE).requires_grad_()
            each = m if m.dim() == 3 else m[:, None].expand(-1, H, -1)
            logarithm = each.log().masked_fill(padding[:, None], -torch.inf)
            out = ours(x, src_key_padding_mask=padding, key_weights=m)
            expected = theirs(x, logarithm[:, :, None].expand(-1, -1, T, -1).flatten(0, 1))
            tokens = ~padding if batch_first else ~padding.T
            assert (out - expected)[tokens].abs().max() <= 1e-12
            a, b = (torch.autograd.grad(y[tokens].square().sum(), m)[0] for y in (out, expected))
            assert (a - b).abs().max() <= 1e-11


OPTIONS = {"gelu": {"activation": "gelu"}, "tanh": {"activation": torch.tanh}, "no bias": {"bias": False}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_other_options(options):
    check(stacks(**options, batch_first=True), batch(), SUFFIX)


def test_a_floating_padding_mask_beside_lengths():
    added = torch.randn(B, T, dtype=DOUBLE)
    theirs = added.masked_fill(SUFFIX, -torch.inf)
    ours, other = stacks(batch_first=True)
    x = batch()
    out = ours(x.masked_fill(SUFFIX[..., None], torch.nan), src_key_padding_mask=added, lengths=LENGTHS)
    assert (out - other(x, src_key_padding_mask=theirs))[~SUFFIX].abs().max() <= 1e-12
    assert not out[SUFFIX].any()


@pytest.mark.parametrize("make", [layers, stacks])
@pytest.mark.parametrize("batch_first", [False, True])
def test_without_a_batch(make, batch_first):
    ours, theirs = make(batch_first=batch_first)
    x = torch.randn(T, E, dtype=DOUBLE)
    assert (ours(x) - theirs(x)).abs().max() <= 1e-12
    expected = theirs(x, LATER, src_key_padding_mask=SUFFIX[1])
    out = ours(x, LATER, src_key_padding_mask=SUFFIX[1])
    assert (out - expected)[~SUFFIX[1]].abs().max() <= 1e-12
    assert torch.equal(ours(x, LATER, lengths=LENGTHS[1], key_weights=torch.ones(H, T)), out)


@pytest.mark.parametrize("make", [layers, lambda **options: stacks(norm=False, **options)])
def test_evaluation_mode(make):
    """Beside PyTorch's fused path for evaluation, dropout is off and padding 0."""
    ours, theirs = make(batch_first=True, dropout=0.5)
    ours.eval(), theirs.eval()
    x = batch()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        theirs.use_nested_tensor = True
        assert (ours(x) - theirs(x)).abs().max() <= 1e-12
        out = ours(x, src_key_padding_mask=SUFFIX)
        expected = theirs(x, src_key_padding_mask=SUFFIX)
    assert (out - expected)[~SUFFIX].abs().max() <= 1e-12
    assert not out[SUFFIX].any()
    assert not torch.equal(ours.train()(x), out)


def test_state_dicts_and_initialisation():
    for options in ({}, {"bias": False, "norm_first": True}):
        made = []
        for source in (nn, torch.nn):
            torch.manual_seed(5)
            layer = source.TransformerEncoderLayer(E, H, 12, **options)
            made.append(source.TransformerEncoder(layer, 2, torch.nn.LayerNorm(E), enable_nested_tensor=False))
        ours, theirs = made
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        ours.load_state_dict(theirs.state_dict(), strict=True)


def test_copies():
    module, _ = stacks(batch_first=True)
    x = batch()
    expected = module(x, lengths=LENGTHS)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(x, lengths=LENGTHS), expected)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "src must have two or three dimensions", {"src": torch.ones(E)}),
        (ValueError, r"src_key_padding_mask must have shape \(N, S\) = \(4, 6\)", {"src_key_padding_mask": SUFFIX.T}),
        (TypeError, "src_key_padding_mask must be a bool", {"src_key_padding_mask": SUFFIX.int()}),
        (TypeError, "lengths must be an integer tensor, got torch.float32", {"lengths": torch.ones(B)}),
        (ValueError, r"lengths must have shape \(B,\) = \(4,\) on cpu, got \(3,\)", {"lengths": LENGTHS[1:]}),
        (ValueError, r"lengths must be within \[0, T=6\], got 7", {"lengths": LENGTHS + 1}),
        (
            ValueError,
            r"lengths must be within \[0, T=6\], got 7",
            {"lengths": LENGTHS + 1, "src_key_padding_mask": NONE},
        ),
        (ValueError, r"lengths must be within \[0, T=6\], got -1", {"lengths": LENGTHS - 2}),
        (ValueError, r"\(B, T\) = \(4, 6\) or", {"lengths": LENGTHS, "key_weights": torch.ones(T)}),
        (ValueError, r"mask must have shape \(L, S\) = \(6, 6\)", {"lengths": LENGTHS, "mask": torch.ones(5, 5)}),
        (ValueError, "have no padding", {"layout": mf.packed_layout(LENGTHS), "lengths": LENGTHS}),
        (
            TypeError,
            r"src must be a dense tensor, with lengths .*, got torch\.jagged",
            {"src": torch.nested.nested_tensor([torch.ones(3, E), torch.ones(5, E)], layout=torch.jagged)},
        ),
        (ValueError, r"src must have shape \(14, E\) as its layout", {"layout": mf.packed_layout(LENGTHS)}),
    ],
)
def test_errors(error, message, change):
    module, _ = stacks(batch_first=True)
    with pytest.raises(error, match=message):
        module(**({"src": batch()} | change))


def test_errors_of_the_constructors():
    with pytest.raises(ValueError, match="activation must be 'relu', 'gelu' or a callable, got 'tanh'"):
        nn.TransformerEncoderLayer(E, H, activation="tanh")
    with pytest.raises(TypeError, match=r"must be a mmer_fast\.nn\.TransformerEncoderLayer, got Linear"):
        nn.TransformerEncoder(torch.nn.Linear(2, 2), 1)

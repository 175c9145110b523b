"""The encoders compute on tokens: what that costs, what padding may hold, packed batches, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformer_twins import DOUBLE, LATER, LENGTHS, NONE, SCATTERED, SUFFIX, B, E, H, T, batch, layers, stacks

import mmer_fast as mf
from mmer_fast.nn import tokens


class TestCost:
    @pytest.fixture
    def rows(self):
        """Rows that reach every linear layer and norm of a stack, per call."""
        module, _ = stacks(batch_first=True)
        seen = []
        for part in module.modules():
            if isinstance(part, (torch.nn.Linear, torch.nn.LayerNorm)):
                part.register_forward_pre_hook(lambda _, x: seen.append(x[0].numel() // x[0].shape[-1]))
        return module, seen

    @pytest.mark.parametrize("padding", [SUFFIX, SCATTERED], ids=["suffix", "scattered"])
    def test_follows_the_tokens(self, rows, padding):
        module, seen = rows
        module(batch(), src_key_padding_mask=padding)
        assert seen == [int((~padding).sum())] * (2 * 5 + 1)  # out_proj, two linear layers, two norms; the last norm

    def test_projections_follow_the_tokens_too(self):
        """The input projection has no module of its own: its operations are counted."""
        module, _ = layers(batch_first=True)
        counts = []
        for lengths in (LENGTHS, torch.full((B,), T)):
            with FlopCounterMode(display=False) as counter:
                module(batch(), lengths=lengths)
            counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.addmm])
        assert counts[0] * B * T == counts[1] * int(LENGTHS.sum())

    @pytest.mark.parametrize("options", [{}, {"lengths": torch.full((B,), T)}, {"src_key_padding_mask": NONE}], ids=str)
    def test_without_padding_nothing_is_packed(self, options, monkeypatch):
        module, theirs = stacks(batch_first=True)
        monkeypatch.setattr(tokens, "pack", None)
        monkeypatch.setattr(tokens, "unpack", None)
        x = batch()
        assert (module(x, **options) - theirs(x)).abs().max() <= 1e-12

    def test_packs_once_for_all_layers(self, monkeypatch):
        module, _ = stacks(batch_first=True)
        calls = []
        for name in ("pack", "unpack"):
            real = getattr(tokens, name)
            monkeypatch.setattr(tokens, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
        module(batch(), src_key_padding_mask=SCATTERED)
        assert calls == ["pack", "unpack"]


@pytest.mark.parametrize("padding", [SUFFIX, SCATTERED], ids=["suffix", "scattered"])
def test_gradients_of_each_sample(padding):
    """vmap cannot read which tokens there are; torch.func.grad can."""
    module, _ = layers(batch_first=True)
    parameters = dict(module.named_parameters())

    def loss(values, x, hidden):
        out = torch.func.functional_call(module, values, (x,), {"src_key_padding_mask": hidden})
        return out.square().sum()

    x = batch()
    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x[:, None], padding[:, None])
    for i in range(B):
        module.zero_grad()
        module(x[i : i + 1], src_key_padding_mask=padding[i : i + 1]).square().sum().backward()
        for name, parameter in parameters.items():
            assert (got[name][i] - parameter.grad).abs().max() <= 1e-11
    whole = torch.func.grad(loss)(parameters, x, padding)
    assert all((whole[name] - got[name].sum(0)).abs().max() <= 1e-10 for name in parameters)


def test_shapes_on_the_meta_device():
    module, _ = stacks(batch_first=True)
    x, padding = batch().to("meta"), SUFFIX.to("meta")
    assert module.to("meta")(x, src_key_padding_mask=padding).shape == (B, T, E)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padding", [SUFFIX, SCATTERED], ids=["suffix", "scattered"])
def test_padding_may_hold_anything(padding, compiled):
    module, _ = stacks(batch_first=True)
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    x = batch()
    results = []
    for given in (x, x.masked_fill(padding[..., None], torch.nan)):
        module.zero_grad()
        leaf = given.clone().requires_grad_()
        out = run(leaf, src_key_padding_mask=padding)
        out.square().sum().backward()
        results.append((out, leaf.grad, *(p.grad for p in module.parameters())))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


class TestCompile:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"src_key_padding_mask": SUFFIX},
            {"src_key_padding_mask": SCATTERED, "mask": LATER},
            {"lengths": LENGTHS, "is_causal": True},
            {"lengths": LENGTHS, "key_weights": torch.linspace(0.1, 1, B * T, dtype=DOUBLE).reshape(B, T)},
            {"src_key_padding_mask": torch.linspace(-1, 1, B * T, dtype=DOUBLE).reshape(B, T), "lengths": LENGTHS},
        ],
        ids=lambda options: " ".join(options),
    )
    def test_without_a_graph_break(self, options):
        module, _ = stacks()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = batch(batch_first=False)
        results = []
        for run in (module, compiled):
            module.zero_grad()
            out = run(x, **options)
            out.square().sum().backward()
            results.append((out, *(p.grad for p in module.parameters())))
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= 1e-11

    def test_packed_tokens(self):
        module, _ = stacks()
        layout = mf.packed_layout(LENGTHS)
        x = torch.randn(layout.total, E, dtype=DOUBLE)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert (compiled(x, layout=layout) - module(x, layout=layout)).abs().max() <= 1e-12

    def test_dropout(self):
        module, _ = stacks(batch_first=True, dropout=0.3)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        out = compiled(batch(), lengths=LENGTHS)
        assert out.isfinite().all()
        assert not out[SUFFIX].any()


class TestPacked:
    @pytest.mark.parametrize("make", [layers, stacks])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_equals_the_padded_form(self, make, batch_first):
        module, _ = make(batch_first=batch_first)
        layout = mf.packed_layout(LENGTHS)
        x = batch()
        given = x if batch_first else x.transpose(0, 1)
        m, mask = torch.rand(B, H, T, dtype=DOUBLE), torch.randn(T, T, dtype=DOUBLE)
        out = module.forward_packed(mf.pack(x, layout), layout, mf.pack(m.transpose(1, 2), layout), mask)
        expected = module(given, mask, lengths=LENGTHS, key_weights=m)
        assert torch.equal(mf.unpack(out, layout, T), expected if batch_first else expected.transpose(0, 1))
        causal = module.forward_packed(mf.pack(x, layout), layout, is_causal=True)
        assert (causal - module(mf.pack(x, layout), LATER.clone(), is_causal=False, layout=layout)).abs().max() <= 1e-12
        # In torch's way: the mask is there, and the flag says that it is the causal one.
        assert torch.equal(causal, module(mf.pack(x, layout), LATER.clone(), is_causal=True, layout=layout))

    def test_runs_through_the_hooks_of_the_layers(self):
        module, _ = stacks()
        layout = mf.packed_layout(LENGTHS)
        calls = []
        for part in (module, *module.layers):
            part.register_forward_hook(lambda part, *_: calls.append(type(part).__name__))
        module.forward_packed(torch.randn(layout.total, E, dtype=DOUBLE), layout)
        assert calls == ["TransformerEncoderLayer"] * 2 + ["TransformerEncoder"]


class TestNothing:
    def test_samples_without_tokens(self):
        ours, theirs = stacks(batch_first=True)
        x, lengths = batch(), torch.tensor([0, 3, 0, 6])
        out = ours(x, lengths=lengths)
        expected = theirs(x[[1, 3]], src_key_padding_mask=torch.arange(T) >= lengths[[1, 3], None])
        assert not out[[0, 2]].any()
        assert (out[1, :3] - expected[0, :3]).abs().max() <= 1e-12
        assert (out[3] - expected[1]).abs().max() <= 1e-12

    @pytest.mark.parametrize("options", [{"lengths": torch.zeros(B).long()}, {"src_key_padding_mask": ~NONE}], ids=str)
    def test_no_tokens_at_all(self, options):
        module, _ = stacks(batch_first=True)
        x = batch().requires_grad_()
        out = module(x, **options)
        out.sum().backward()
        assert out.shape == x.shape
        assert not out.any()
        assert not x.grad.any()

    @pytest.mark.parametrize("shape", [(0, T, E), (B, 0, E)])
    def test_empty_batches(self, shape):
        module, _ = stacks(batch_first=True)
        x = torch.zeros(shape, dtype=DOUBLE)
        mask = torch.zeros(shape[:2], dtype=torch.bool)
        assert module(x).shape == shape
        assert module(x, src_key_padding_mask=mask).shape == shape


def test_dropout_follows_the_seed():
    module, _ = stacks(batch_first=True, dropout=0.3)
    x = batch()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(module(x, lengths=LENGTHS))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("padding", [None, SUFFIX, SCATTERED], ids=["none", "suffix", "scattered"])
def test_autocast(padding):
    module, _ = stacks(batch_first=True)
    module, x = module.float(), batch().float()
    expected = module(x, src_key_padding_mask=padding)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, src_key_padding_mask=padding)
    assert out.dtype == torch.float32  # of the last LayerNorm
    torch.testing.assert_close(out, expected, atol=0.1, rtol=0.05)
    grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    assert all(g.isfinite().all() for g in grads)

"""What MultiheadAttention has beyond PyTorch's class: key weights, lengths, seeds, packed tokens."""

from __future__ import annotations

import pytest
import torch
from attention_twins import DOUBLE, E, H, L, N, S, inputs, padding, pair

import mmer_fast as mf


class TestDropout:
    def test_weights_are_those_that_were_used(self):
        module, _ = pair(dropout=0.5, batch_first=True)
        query, key, value = inputs(batch_first=True)
        _, full = module.eval()(query, key, value, average_attn_weights=False)
        out, weights = module.train()(query, key, value, average_attn_weights=False, seed=11)
        dropped = weights == 0
        assert 0 < dropped.double().mean() < 1
        assert (weights - full.masked_fill(dropped, 0.0) / 0.5).abs().max() <= 1e-12
        projected = torch.nn.functional.linear(value, module.in_proj_weight[2 * E :], module.in_proj_bias[2 * E :])
        attended = weights @ projected.unflatten(-1, (H, -1)).transpose(1, 2)
        assert (module.out_proj(attended.transpose(1, 2).flatten(2)) - out).abs().max() <= 1e-12

    def test_seeds(self):
        module, _ = pair(dropout=0.4)
        tensors = inputs()
        outs = [module(*tensors, seed=seed)[0] for seed in (1, torch.tensor([1]), 2)]
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])
        torch.manual_seed(1)
        first = module(*tensors)[0]
        assert not torch.equal(first, module(*tensors)[0])
        torch.manual_seed(1)
        assert torch.equal(first, module(*tensors)[0])
        assert torch.equal(module.eval()(*tensors)[0], module(*tensors, seed=3)[0])


class TestKeyWeights:
    @pytest.mark.parametrize("appended", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
    @pytest.mark.parametrize("per_head", [False, True])
    def test_are_a_mask_of_their_logarithm(self, per_head, appended):
        ours, theirs = pair(**appended)
        tensors = inputs()
        m = torch.rand((N, H, S) if per_head else (N, S), dtype=DOUBLE).requires_grad_()
        out, weights = ours(*tensors, key_weights=m, average_attn_weights=False)
        logarithm = (m.log() if per_head else m.log()[:, None].expand(-1, H, -1))[:, :, None].expand(-1, -1, L, -1)
        expected, their_weights = theirs(*tensors, attn_mask=logarithm.flatten(0, 1), average_attn_weights=False)
        assert (out - expected).abs().max() <= 1e-12
        assert (weights - their_weights).abs().max() <= 1e-12
        for ours_, theirs_ in ((out, expected), (weights, their_weights)):
            a, b = (torch.autograd.grad((x * x).sum(), m, retain_graph=True)[0] for x in (ours_, theirs_))
            assert (a - b).abs().max() <= 1e-11

    def test_without_a_batch(self):
        module, _ = pair()
        query, key, value = inputs(batched=False)
        m, lengths = torch.rand(H, S, dtype=DOUBLE), torch.tensor(3)
        out, weights = module(query, key, value, key_weights=m, lengths=lengths, query_lengths=torch.tensor(2))
        batched = module(
            *(x[:, None] for x in (query, key, value)), key_weights=m[None], lengths=lengths[None],
            query_lengths=torch.tensor([2]),
        )  # fmt: skip
        assert torch.equal(out, batched[0][:, 0])
        assert torch.equal(weights, batched[1][0])


class TestLengths:
    LENGTHS = torch.tensor([5, 2, 0])
    QUERIES = torch.tensor([4, 3, 2])

    @pytest.mark.parametrize("appended", [{}, {"add_bias_kv": True}])
    @pytest.mark.parametrize("masked", [False, True])
    def test_are_a_padding_mask(self, masked, appended):
        module, _ = pair(**appended)
        tensors = inputs()
        mask = padding() if masked else None
        beyond = torch.arange(S) >= self.LENGTHS[:, None]
        out, weights = module(*tensors, lengths=self.LENGTHS, key_padding_mask=mask)
        both = beyond if mask is None else beyond | mask
        expected, their_weights = module(*tensors, key_padding_mask=both)
        assert torch.equal(out, expected)
        assert torch.equal(weights, their_weights)

    def test_queries_without_keys_and_beyond_their_length_attend_to_nothing(self):
        module, _ = pair(batch_first=True)
        out, weights = module(*inputs(batch_first=True), lengths=self.LENGTHS, query_lengths=self.QUERIES)
        nothing = module.out_proj.bias
        assert torch.equal(out[2], nothing.expand(L, E))
        assert torch.equal(out[1, 3:], nothing.expand(1, E))
        assert not weights[2].any()
        assert not weights[1, 3:].any()
        assert (weights[0].sum(-1) - 1).abs().max() <= 1e-12

    def test_gradients_of_inputs_do_not_see_what_padding_holds(self):
        module, _ = pair(batch_first=True)
        counts = (self.QUERIES, self.LENGTHS, self.LENGTHS)
        padding = [(torch.arange(n) >= c[:, None])[..., None] for n, c in zip((L, S, S), counts, strict=True)]
        clean = inputs(batch_first=True)
        results = []
        for fill in (1.0, torch.nan):
            leaves = [x.masked_fill(p, fill).requires_grad_() for x, p in zip(clean, padding, strict=True)]
            out, weights = module(*leaves, lengths=self.LENGTHS, query_lengths=self.QUERIES)
            grads = torch.autograd.grad(out.sum() + weights.square().sum(), leaves)
            results.append((out, weights, *grads))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()


class TestPacked:
    LENGTHS = torch.tensor([4, 1, 2])
    KEYS = torch.tensor([2, 5, 3])

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("weighted", [None, "shared", "of each head"])
    def test_equals_the_padded_form(self, weighted, causal):
        module, _ = pair(batch_first=True)
        x = torch.randn(N, L, E, dtype=DOUBLE)
        layout = mf.packed_layout(self.LENGTHS)
        m = packed_m = None
        if weighted is not None:
            m = torch.rand((N, L) if weighted == "shared" else (N, H, L), dtype=DOUBLE).requires_grad_()
            packed_m = mf.pack(m if weighted == "shared" else m.transpose(1, 2), layout)
        tokens = mf.pack(x, layout)
        out = module.forward_packed(tokens, tokens, tokens, layout, key_weights=packed_m, is_causal=causal)
        padded, _ = module(x, x, x, lengths=self.LENGTHS, key_weights=m, is_causal=causal, need_weights=False)
        expected = mf.pack(padded, layout)
        assert (out - expected).abs().max() <= 1e-12
        wanted = [*module.parameters(), *([m] if m is not None else [])]
        grads = (torch.autograd.grad((x * x).sum(), wanted, retain_graph=True) for x in (out, expected))
        for a, b in zip(*grads, strict=True):
            assert (a - b).abs().max() <= 1e-11

    def test_keys_elsewhere(self):
        module, _ = pair(batch_first=True, kdim=6, vdim=3)
        query, key, value = inputs(batch_first=True, kdim=6, vdim=3)
        layout, keys = mf.packed_layout(self.LENGTHS), mf.packed_layout(self.KEYS)
        bias = torch.randn(N, H, 4, 5, dtype=DOUBLE)
        out = module.forward_packed(
            mf.pack(query, layout), mf.pack(key, keys), mf.pack(value, keys), layout, keys, bias=bias
        )
        padded, _ = module(query, key, value, lengths=self.KEYS, attn_mask=bias.flatten(0, 1))
        assert (out - mf.pack(padded, layout)).abs().max() <= 1e-12

    def test_dropout_is_that_of_the_padded_form(self):
        module, _ = pair(batch_first=True, dropout=0.5)
        x = torch.randn(N, L, E, dtype=DOUBLE)
        layout = mf.packed_layout(self.LENGTHS)
        tokens = mf.pack(x, layout)
        out = module.forward_packed(tokens, tokens, tokens, layout, seed=9)
        padded, _ = module(x, x, x, lengths=self.LENGTHS, need_weights=False, seed=9)
        assert (out - mf.pack(padded, layout)).abs().max() <= 1e-12
        assert not torch.equal(out, module.forward_packed(tokens, tokens, tokens, layout, seed=8))

    def test_errors(self):
        layout = mf.packed_layout(self.LENGTHS)
        x = torch.randn(7, E, dtype=DOUBLE)
        with pytest.raises(ValueError, match="without add_bias_kv and add_zero_attn"):
            pair(add_zero_attn=True)[0].forward_packed(x, x, x, layout)
        with pytest.raises(ValueError, match=r"key must have shape \(7, E\) as its layout says, got \(6, 8\)"):
            pair()[0].forward_packed(x, x[:6], x[:6], layout)

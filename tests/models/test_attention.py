"""Attention against the formula."""

from __future__ import annotations

import pytest
import torch

import mmer_fast as mf
from mmer_fast.models.attention import MultiHeadAttention, Spans


def test_a_sample_without_context_reads_the_output_bias_and_sends_no_gradient() -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(4, 1)
    queries, context = mf.packed_layout(torch.tensor([2, 1])), mf.packed_layout(torch.tensor([0, 3]))
    q, c = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    out = attention(q, c, Spans.of(queries), Spans.of(context))
    out.sum().backward()
    assert torch.equal(out[:2], attention.out.bias.expand(2, -1))
    assert q.grad is not None
    assert c.grad is not None
    assert (q.grad[:2] == 0).all()
    assert c.grad.isfinite().all()
    assert c.grad.abs().sum() > 0


def test_multi_head_attention_equals_the_library_module() -> None:
    torch.manual_seed(0)
    ours, theirs = (
        MultiHeadAttention(8, 2).double(),
        torch.nn.MultiheadAttention(8, 2, batch_first=True).double(),
    )
    projections = [ours.query, ours.key, ours.value]
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    query, context = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    valid = torch.arange(5) < torch.tensor([[4], [2]])
    expected, _ = theirs(query, context, context, key_padding_mask=~valid)
    memory = mf.packed_layout(torch.tensor([4, 2]))
    queries = Spans.equal(2, 3, query.device)
    out = ours(query.flatten(0, 1), mf.pack(context, memory), queries, Spans.of(memory))
    torch.testing.assert_close(out.unflatten(0, (2, 3)), expected)


@pytest.mark.parametrize("itself", [True, False])
def test_attention_weights_drop_out_in_training_alone(itself: bool) -> None:
    attention, without = MultiHeadAttention(8, 2, dropout=0.5), MultiHeadAttention(8, 2)
    without.load_state_dict(attention.state_dict())
    spans, x = Spans.of(mf.packed_layout(torch.tensor([4, 2]))), torch.randn(6, 8)
    inputs = x, x if itself else torch.randn(6, 8), spans, spans
    assert not torch.equal(attention(*inputs), attention(*inputs))
    assert torch.equal(attention.eval()(*inputs), without(*inputs))

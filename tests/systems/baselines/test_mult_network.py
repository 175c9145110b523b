"""MulT against a direct transcription, one sample, head and query at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_baselines import CONFIGS, LABELS, LENGTHS, MODALITIES, learnable_data, small_model
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.data import Batch, DataError
from mmer_fast.systems.baselines import MulT, future_bias


def written_out(model: MulT, batch: Batch, sample: int) -> Tensor:
    """Logits (K,) of a sample."""
    inputs = {}
    for name in MODALITIES:
        own_tf = batch.features[name][sample, : LENGTHS[name][sample]]
        inputs[name] = model.embeddings[name](model.standardization[name](own_tf))
    summaries = []
    for name in MODALITIES:
        streams = [
            stack(model.cross[name][other], inputs[name], inputs[other]) for other in MODALITIES if other != name
        ]
        collected = torch.cat(streams, dim=1)
        collected = stack(model.self_attention[name], collected, None)
        summaries.append(collected[-1] if len(collected) else collected.new_zeros(collected.shape[1]))
    h = torch.cat(summaries)
    rise, fall = model.classifier.feed_forward[0], model.classifier.feed_forward[3]
    return model.classifier.out(h + fall(torch.relu(rise(h))))


def stack(module: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    x = embedded(x)
    memory = None if context is None else embedded(context)
    for level in module.levels:
        c = level.context_norm(x if memory is None else memory)
        x = x + attention(level.attention, level.query_norm(x), c)
        rise, fall = level.feed_forward[0], level.feed_forward[3]
        x = x + fall(torch.relu(rise(level.feed_forward_norm(x))))
    return module.norm(x)


def embedded(x: Tensor) -> Tensor:
    dim = x.shape[1]
    position = torch.zeros_like(x)
    for t in range(len(x)):
        for i in range(0, dim, 2):
            position[t, i] = math.sin(t / 10000 ** (i / dim))
            position[t, i + 1] = math.cos(t / 10000 ** (i / dim))
    return math.sqrt(dim) * x + position


def attention(module: nn.MultiheadAttention, x: Tensor, c: Tensor) -> Tensor:
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (source @ w.T + b for source, w, b in zip((x, c, c), weights, biases, strict=True))
    reach = abs(len(c) - len(x))
    rows = []
    for i in range(len(x)):
        seen = min(len(c), i + reach + 1)
        heads = []
        for q_e, k_se, v_se in zip(*(y.chunk(module.num_heads, dim=-1) for y in (q[i], k, v)), strict=True):
            scores = (k_se[:seen] @ q_e) / math.sqrt(len(q_e))
            heads.append(scores.softmax(dim=0) @ v_se[:seen])
        rows.append(torch.cat(heads))
    return module.out_proj(torch.stack(rows)) if rows else x


def test_logits_against_the_transcription(batch: Batch) -> None:
    model = small_model(MulT)
    logits = model.logits(batch)
    for sample in range(5):
        torch.testing.assert_close(logits[sample], written_out(model, batch, sample), rtol=1e-6, atol=1e-7)


def test_the_mask_is_triu_of_the_difference_in_length() -> None:
    lengths_q, lengths_k = torch.tensor([3, 5, 1, 4]), torch.tensor([5, 2, 1, 0])
    bias = future_bias(mf.packed_layout(lengths_q), mf.packed_layout(lengths_k))
    assert bias.shape == (4, 1, 5, 5)
    for b, (t, s) in enumerate(zip(lengths_q.tolist(), lengths_k.tolist(), strict=True)):
        hidden = torch.triu(torch.ones(t, s), 1 + abs(s - t)).bool()
        assert torch.equal(bias[b, 0, :t, :s] == -torch.inf, hidden)
        assert not bias[b, 0, :t, :s][~hidden].any()


@pytest.mark.parametrize("mask", ["future", "none"])
def test_a_future_unit_is_not_seen(mask: str, batch: Batch) -> None:
    """Frames and sound of sample 1 are as long (4): a stream's unit t depends on units up to t only."""
    model = small_model(MulT, mask=mask, self_attention=False)
    stream = model.cross["frames"]["sound"]

    def second_unit() -> Tensor:
        tokens = {name: x._replace(values=model.embeddings[name](x.values)) for name, x in model.tokens(batch).items()}
        start = int(tokens["frames"].layout.cu_seqlens[1])
        return stream(tokens["frames"], tokens["sound"])[start + 1]

    before = second_unit()
    batch.features["sound"][1, 2:] += 1
    assert torch.equal(second_unit(), before) == (mask == "future")


def test_attention_dropout_is_that_of_what_is_read() -> None:
    config = replace(CONFIGS[MulT], attention_dropout=0.3, other_attention_dropout=0.2)
    model = MulT(MODALITIES, LABELS, config)
    rates = {
        (name, other): {level.attention.dropout for level in module.levels}
        for name, streams in model.cross.items()
        for other, module in streams.items()
    }
    assert rates["frames", "text"] == rates["sound", "text"] == {0.3}
    assert rates["text", "sound"] == rates["frames", "sound"] == {0.2}
    assert {level.attention.dropout for level in model.self_attention["text"].levels} == {0.3}
    assert {level.attention.dropout for level in model.self_attention["sound"].levels} == {0.2}


def test_one_modality_has_no_other_to_attend_to() -> None:
    data = learnable_data().select(["text"])
    with pytest.raises(DataError, match=r"MulT needs at least two modalities.*; got text"):
        MulT.check_data(data, CONFIGS[MulT])
    MulT.check_data(learnable_data(), CONFIGS[MulT])
    with pytest.raises(ValueError, match="modalities must be at least two for MulT, got text"):
        MulT(data.modalities, LABELS, CONFIGS[MulT])

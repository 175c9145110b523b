"""HHMPN against a direct transcription, one sample, label and modality at a time."""

from __future__ import annotations

import math

import pytest
import torch
from small_baselines import LABELS, LENGTHS, MODALITIES, small_model
from torch import Tensor, nn

from mmer_fast.data import Batch
from mmer_fast.systems.baselines import HHMPN


def written_out(model: HHMPN, batch: Batch, sample: int) -> Tensor:
    """Logits (K,) of a sample."""
    units = []
    for name, kind in zip(MODALITIES, model.modality_embedding, strict=True):
        own_tf = batch.features[name][sample, : LENGTHS[name][sample]]
        units.append(model.embeddings[name](model.standardization[name](own_tf)) + kind)
    x = torch.cat(units)
    for block in model.encoder.blocks:
        x = block.attention_norm(x + attend(block.attention, x, x))
        x = block.feed_forward_norm(x + feed_forward(block.feed_forward, x))
    units = dict(zip(MODALITIES, model.encoder.norm(x).split([len(part) for part in units]), strict=True))
    u = model.label_embedding
    for layer in model.label_layers:
        messages = layer.messages
        read = {name: attend(messages.attention[name], u, h) for name, h in units.items() if len(h)}
        u = layer.messages_norm(u + torch.stack([combined(messages.scorer, u[k], read, k) for k in range(LABELS)]))
        u = layer.between_norm(u + between(layer.between, u, model.graph))
        u = layer.feed_forward_norm(u + feed_forward(layer.feed_forward, u))
    return torch.stack([u[k] @ model.label_embedding[k] + model.label_bias[k] for k in range(LABELS)])


def combined(scorer: nn.Module | None, u_d: Tensor, read: dict[str, Tensor], k: int) -> Tensor:
    if not read:
        return torch.zeros_like(u_d)
    if scorer is None:
        return sum(a[k] for a in read.values()) / len(read)
    scores = [scorer.score.weight[0] @ torch.tanh(scorer.label(u_d) + scorer.message(a[k])) for a in read.values()]
    weights = torch.stack(scores).softmax(dim=0)
    return sum(weight * a[k] for weight, a in zip(weights, read.values(), strict=True))


def heads(q: Tensor, k: Tensor, v: Tensor, number: int, seen: Tensor) -> Tensor:
    parts = []
    for q_te, k_se, v_se in zip(*(y.chunk(number, dim=-1) for y in (q, k, v)), strict=True):
        scores = q_te @ k_se.T / math.sqrt(q_te.shape[1])
        parts.append(scores.masked_fill(~seen, -torch.inf).softmax(dim=1) @ v_se)
    return torch.cat(parts, dim=1)


def attend(module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    everything = torch.ones(len(x), len(context), dtype=torch.bool)
    q, k, v = module.query(x), module.key(context), module.value(context)
    return module.out(heads(q, k, v, module.heads, everything))


def between(module: nn.MultiheadAttention, u: Tensor, graph: Tensor) -> Tensor:
    q, k, v = (u @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, dim=1)
    return module.out_proj(heads(q, k, v, module.num_heads, graph))


def feed_forward(module: nn.Sequential, x: Tensor) -> Tensor:
    return module[3](torch.relu(module[0](x)))


@pytest.mark.parametrize("modality_weights", ["attention", "mean"])
def test_logits_against_the_transcription(modality_weights: str, batch: Batch) -> None:
    model = small_model(HHMPN, modality_weights=modality_weights)
    model.graph[0, 2] = model.graph[2, 0] = model.graph[1, 3] = model.graph[3, 1] = False
    logits = model.logits(batch)
    for sample in range(5):
        torch.testing.assert_close(logits[sample], written_out(model, batch, sample), rtol=1e-9, atol=1e-12)


def test_a_label_hears_its_neighbours_only(batch: Batch) -> None:
    model = small_model(HHMPN, label_layers=1)
    model.graph.copy_(torch.eye(LABELS))
    model.graph[0, 1] = model.graph[1, 0] = True

    def change(label: int) -> Tensor:
        """Which logits follow the embedding of a label."""
        before = model.logits(batch)
        kept = model.label_embedding.data.clone()
        model.label_embedding.data[label] += 0.1
        moved = (model.logits(batch) - before).abs().amax(dim=0) > 1e-9
        model.label_embedding.data.copy_(kept)
        return moved

    assert change(1).tolist() == [True, True, False, False]
    assert change(3).tolist() == [False, False, False, True]


def test_units_of_different_modalities_exchange_messages(batch: Batch) -> None:
    model = small_model(HHMPN)
    before = model.encode(batch)["frames"].values.clone()
    batch.features["text"][0, 0] += 1
    moved_n = (model.encode(batch)["frames"].values - before).abs().amax(dim=1) > 1e-9
    assert moved_n.tolist() == [True] * LENGTHS["frames"][0] + [False] * sum(LENGTHS["frames"][1:])

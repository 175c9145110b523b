"""Small conversations, and MMGCN on them as plain loops over dialogues and nodes in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmer_fast.data import Batch, MultiModalData, SequenceDataset, make_dialogues
from mmer_fast.systems.mmgcn import MMGCN, MMGCNConfig

TINY = {"dim": 6, "graph_dim": 5, "speaker_dim": 3, "recurrent_layers": 1, "layers": 3, "dropout": 0.0}


def small_data(seed: int = 0, **options: Any) -> MultiModalData:
    sizes: dict[str, Any] = {"n_train": 6, "n_valid": 2, "n_test": 2, "max_length": 8, "max_utterances": 8}
    return make_dialogues(seed, **sizes | {"missing_share": 0.25} | options)


def small_batch(data: MultiModalData, dtype: torch.dtype = torch.float64) -> Batch:
    """The whole training split."""
    dataset = SequenceDataset(data.splits["train"], MMGCN.input_extras)
    batch = dataset.__getitems__(range(len(dataset)))
    batch.features = {name: x.to(dtype) for name, x in batch.features.items()}
    return batch


def small_model(data: MultiModalData, **fields: Any) -> MMGCN:
    """In float64, in evaluation."""
    torch.manual_seed(0)
    return MMGCN(data.modalities, len(data.label_names), MMGCNConfig(**TINY | fields)).double().eval()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """1 − arccos(0.99999 cos)/π of two vectors."""
    cosine = torch.dot(a, b) / (torch.dot(a, a).sqrt() * torch.dot(b, b).sqrt())
    return 1 - torch.acos(0.99999 * cosine) / math.pi


def adjacency(nodes: list[tuple[int, int, Tensor]], gamma: float) -> Tensor:
    """P of the nodes of one dialogue, (modality, position, vector) each, edge by edge."""
    zero = torch.zeros((), dtype=torch.float64)
    a = []
    for modality_i, position_i, x_i in nodes:
        a.append([])
        for modality_j, position_j, x_j in nodes:
            edge = zero
            if modality_i == modality_j:
                edge = similarity(x_i, x_j)
            elif position_i == position_j:
                edge = gamma * similarity(x_i, x_j)
            a[-1].append(edge)
    degree = [sum(row) for row in a]
    return torch.stack(
        [
            torch.stack([edge / torch.sqrt(degree[i] * degree[j]) for j, edge in enumerate(row)])
            for i, row in enumerate(a)
        ]
    )


def gcnii(x: Tensor, p: Tensor, network: Any, alpha: float, decay: float, variant: bool) -> Tensor:
    """GCNII as its equations say, on the nodes (N, F) of one dialogue."""
    initial = torch.clamp(x @ network.embedding.weight.T + network.embedding.bias, min=0)
    h = initial
    for index, layer in enumerate(network.layers, start=1):
        theta = math.log(decay / index + 1)
        neighbours = p @ h
        mixed = (1 - alpha) * neighbours + alpha * initial
        read = torch.cat([neighbours, initial], dim=1) if variant else mixed
        h = torch.clamp((1 - theta) * mixed + theta * (read @ layer.weight), min=0)
    return h


def textbook_logits(model: MMGCN, batch: Batch) -> Tensor:
    """The logits of a model with fusion="graph", dialogue by dialogue; (B, K) float64."""
    config, names = model.config, list(model.modalities)
    dialogue_b, speaker_b = batch.extras["dialogue"], batch.extras["speaker"]
    logits = torch.zeros(len(batch), model.labels, dtype=torch.float64)
    for dialogue in dialogue_b.unique():
        rows = [int(b) for b in (dialogue_b == dialogue).nonzero()]
        nodes, place = [], {}
        for m, name in enumerate(names):
            there = [b for b in rows if batch.lengths[name][b] > 0]
            if not there:
                continue
            means = [batch.features[name][b, : int(batch.lengths[name][b])].mean(dim=0) for b in there]
            encoder = model.encoders[name]
            hidden = encoder.linear(torch.stack(means))
            if encoder.lstm is not None:
                hidden = encoder.lstm.lstm(hidden)[0]
            for b, h in zip(there, hidden, strict=True):
                embedding = model.speaker_embedding.weight[speaker_b[b]]
                if config.speaker_join == "concatenate":
                    h = torch.cat([h, embedding])
                elif name in config.speaker_modalities.split("+"):
                    h = h + embedding
                place[b, m] = len(nodes)
                nodes.append((m, rows.index(b), h))
        x = torch.stack([x for _, _, x in nodes])
        g = gcnii(x, adjacency(nodes, config.gamma), model.networks[0], config.alpha, config.decay, config.variant)
        for b in rows:
            parts = []
            for m in range(len(names)):
                node = place.get((b, m))
                width = x.shape[1] + g.shape[1]
                parts.append(torch.zeros(width).double() if node is None else torch.cat([x[node], g[node]]))
            logits[b] = model.classifier(torch.clamp(torch.cat(parts), min=0))
    return logits


def majority_accuracy(data: MultiModalData, split: str = "test") -> float:
    """Share of a split that has the most frequent class of the training data."""
    favourite = int(np.argmax(data.splits["train"].labels.sum(axis=0)))
    return float(data.splits[split].labels[:, favourite].mean())

"""The label graph of HHMPN against its definition, written out in loops."""

from __future__ import annotations

import math

import pytest
import torch
from small_baselines import LABELS, learnable_data, small_model

from mmer_fast.systems.baselines import HHMPN, label_graph


def written_out(labels: list[list[int]], threshold: float) -> list[list[bool]]:
    k = len(labels[0])
    graph = []
    for i in range(k):
        row = []
        for j in range(k):
            together = sum(sample[i] * sample[j] for sample in labels)
            n_i, n_j = sum(sample[i] for sample in labels), sum(sample[j] for sample in labels)
            affinity = together / math.sqrt(n_i * n_j) if n_i and n_j else 0.0
            row.append(affinity + (i == j) >= threshold)
        graph.append(row)
    return graph


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.45, 1.0])
def test_against_the_definition(threshold: float) -> None:
    labels = (torch.rand(60, 7) < torch.tensor([0.6, 0.5, 0.3, 0.2, 0.1, 0.05, 0.0])).int()
    graph = label_graph(labels, threshold)
    assert graph.tolist() == written_out(labels.tolist(), threshold)
    assert torch.equal(graph, graph.T)
    assert graph.diagonal().all()


def test_labels_meet_at_the_threshold_itself() -> None:
    labels = torch.zeros(27, 2, dtype=torch.uint8)
    labels[:4, 0] = 1
    labels[2:, 1] = 1  # n = 4 and 25, two together: 2 / sqrt(100)
    assert label_graph(labels, 0.2).all()
    assert not label_graph(labels, 0.21)[0, 1]


def test_a_label_that_never_occurs_hears_itself_only() -> None:
    labels = torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert label_graph(labels).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_fit_takes_it_from_the_training_labels() -> None:
    data = learnable_data()
    data.splits["train"].labels[:, 3] = data.splits["train"].labels.max(axis=1) == 0  # 3 excludes all others
    model = small_model(HHMPN)
    assert model.graph.all()
    model.fit(data.splits["train"])
    assert model.graph.tolist() == written_out(data.splits["train"].labels.tolist(), 0.2)
    assert not model.graph[3, :3].any()
    complete = small_model(HHMPN, graph="complete")
    complete.fit(data.splits["train"])
    assert complete.graph.sum() == LABELS**2


def test_what_is_no_label_matrix() -> None:
    with pytest.raises(ValueError, match=r"labels must have shape \(N, K\), got \(3,\)"):
        label_graph(torch.ones(3))
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.5"):
        label_graph(torch.ones(3, 2), 1.5)

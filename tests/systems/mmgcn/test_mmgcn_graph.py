"""The graph of dialogues: its weights, its product, its gradients, and what is not there."""

from __future__ import annotations

import math

import pytest
import torch
from small_conversations import adjacency, similarity

from mmer_fast.systems.mmgcn import DialogueGraph, angular_similarity, dialogue_graph

PRESENT = torch.tensor(  # two dialogues of 4 and 2 utterances, three modalities
    [[[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]], dtype=torch.bool
)


def make_nodes(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, dtype=dtype)


@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.0])
def test_every_edge_is_that_of_the_definition(gamma):
    x_gmld = make_nodes()
    dense_gnn = dialogue_graph(x_gmld, PRESENT, gamma).dense()
    for x_mld, present_ml, dense_nn in zip(x_gmld, PRESENT, dense_gnn, strict=True):
        there = present_ml.nonzero().tolist()
        nodes = [(m, position, x_mld[m, position]) for m, position in there]
        index = [m * 4 + position for m, position in there]
        expected = torch.zeros(12, 12, dtype=torch.float64)
        expected[torch.tensor(index)[:, None], torch.tensor(index)] = adjacency(nodes, gamma)
        torch.testing.assert_close(dense_nn, expected, rtol=1e-12, atol=1e-14)


def test_the_product_is_that_of_the_dense_matrix():
    graph, h_gmld = dialogue_graph(make_nodes(), PRESENT, 0.7), make_nodes()
    expected = (graph.dense() @ h_gmld.flatten(1, 2)).unflatten(1, (3, 4))
    torch.testing.assert_close(graph.propagate(h_gmld), expected, rtol=1e-12, atol=1e-14)
    alone = graph.stream(1)
    torch.testing.assert_close(alone.propagate(h_gmld[:, 1:2]), graph.within[:, 1:2] @ h_gmld[:, 1:2])


def test_what_is_absent_may_hold_anything_and_gets_no_gradient():
    x_gmld = make_nodes()
    expected = dialogue_graph(x_gmld, PRESENT, 0.7).dense()
    x_gmld = torch.where(PRESENT[..., None], x_gmld, float("nan")).requires_grad_()
    dense = dialogue_graph(x_gmld, PRESENT, 0.7).dense()
    torch.testing.assert_close(dense, expected, rtol=0, atol=0)
    dense.square().sum().backward()
    assert torch.equal(x_gmld.grad[~PRESENT], torch.zeros_like(x_gmld.grad[~PRESENT]))
    assert x_gmld.grad[PRESENT].isfinite().all()
    assert (x_gmld.grad[PRESENT] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_nodes_are_identical_opposite_or_zero(dtype):
    x_gmld = make_nodes(dtype)
    x_gmld[:, :, 1] = x_gmld[:, :, 0]
    x_gmld[:, 1] = x_gmld[:, 0]
    x_gmld[0, 0, 2] = -x_gmld[0, 0, 0]
    x_gmld[0, 0, 3] = 0
    x_gmld.requires_grad_()
    everywhere = torch.ones(2, 3, 4, dtype=torch.bool)
    graph = dialogue_graph(x_gmld, everywhere)
    sum((weights * torch.randn_like(weights)).sum() for weights in (graph.within, graph.across)).backward()
    assert x_gmld.grad.isfinite().all()
    assert x_gmld.grad.abs().max() < 1e3


def test_gradcheck():
    x_gmld, h_gmld = make_nodes().requires_grad_(), make_nodes().requires_grad_()

    def weights(x):
        graph = dialogue_graph(x, PRESENT, 0.7)
        return graph.within, graph.across

    assert torch.autograd.gradcheck(weights, x_gmld)
    within, across = (w.detach().requires_grad_() for w in weights(x_gmld))
    assert torch.autograd.gradcheck(lambda w, a, h: DialogueGraph(w, a).propagate(h), (within, across, h_gmld))


def test_symmetric_with_spectrum_within_one():
    dense = dialogue_graph(make_nodes(), PRESENT, 0.7).dense()
    torch.testing.assert_close(dense, dense.transpose(1, 2), rtol=0, atol=1e-15)
    assert torch.linalg.eigvalsh(dense).abs().max() <= 1 + 1e-12


def test_angular_similarity():
    assert angular_similarity(torch.tensor(0.0)) == pytest.approx(0.5, abs=1e-6)
    assert angular_similarity(torch.tensor(1.0)).item() == pytest.approx(1 - math.acos(0.99999) / math.pi, abs=1e-4)
    a, b = torch.randn(2, 7, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
    assert angular_similarity(cosine).item() == pytest.approx(similarity(a, b).item(), abs=1e-14)
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    angular_similarity(one).backward()
    assert 0 < one.grad < 72


def test_autocast_leaves_the_weights_in_float32():
    x_gmld = make_nodes(torch.float32)
    expected = dialogue_graph(x_gmld, PRESENT)
    with torch.autocast("cpu", torch.bfloat16):
        graph = dialogue_graph(x_gmld, PRESENT)
        assert graph.propagate(x_gmld).isfinite().all()
    assert graph.within.dtype == torch.float32
    assert torch.equal(graph.within, expected.within)


@pytest.mark.parametrize(
    ("x", "present", "gamma", "message"),
    [
        (torch.zeros(2, 3, 4), PRESENT, 1.0, r"x must have shape \(G, M, L, D\)"),
        (torch.zeros(2, 3, 4, 5), PRESENT[:, :2], 1.0, r"of \(2, 2, 4\)"),
        (torch.zeros(2, 3, 4, 5), PRESENT.long(), 1.0, "present be bool .*int64"),
        (torch.zeros(2, 3, 4, 5), PRESENT, -0.1, "gamma must be at least 0, got -0.1"),
        (torch.zeros(2, 3, 4, 5), PRESENT, math.nan, "gamma must be at least 0, got nan"),
    ],
)
def test_bad_arguments(x, present, gamma, message):
    with pytest.raises(ValueError, match=message):
        dialogue_graph(x, present, gamma)

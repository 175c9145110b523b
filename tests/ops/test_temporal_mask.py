"""The mask of ATM: 1 - T with k from each row's own length."""

from __future__ import annotations

import torch

import mmer_fast as mf


def test_is_one_minus_the_plan(backend, device):
    scores = torch.randn(3, 20, dtype=torch.float64, device=device)
    mask = mf.temporal_mask(scores, 0.4, backend=backend)
    assert torch.allclose(mask, 1 - mf.soft_topk(scores, 8, backend=backend), atol=1e-12)
    lowest = mf.temporal_mask(scores, 0.4, largest=False, backend=backend)
    assert torch.allclose(lowest, 1 - mf.soft_topk(scores, 8, largest=False, backend=backend), atol=1e-12)


def test_k_comes_from_each_rows_length(backend, device):
    scores = torch.randn(4, 10, dtype=torch.float64, device=device)
    lengths = torch.tensor([10, 5, 0, 3], device=device)
    mask = mf.temporal_mask(scores, 0.4, lengths=lengths, backend=backend)
    assert torch.allclose(mask.sum(-1), 0.6 * lengths.double())
    assert (mask[torch.arange(10, device=device) >= lengths[:, None]] == 0).all()
    as_mask = torch.arange(10, device=device) < lengths[:, None]
    assert torch.allclose(mf.temporal_mask(scores, 0.4, mask=as_mask, backend=backend), mask)


def test_k_may_be_given(backend, device):
    scores = torch.randn(2, 60, dtype=torch.float64, device=device)
    mask = mf.temporal_mask(scores, k=24, backend=backend)
    assert torch.allclose(mask.sum(-1), torch.full((2,), 36.0, dtype=torch.float64, device=device))
    per_row = mf.temporal_mask(scores, k=torch.tensor([24, 60], device=device), backend=backend)
    assert torch.allclose(per_row[0], mask[0])
    assert (per_row[1] == 0).all()


def test_all_or_nothing(backend, device):
    scores = torch.randn(2, 7, device=device)
    assert (mf.temporal_mask(scores, 0.0, backend=backend) == 1).all()
    assert (mf.temporal_mask(scores, 1.0, backend=backend) == 0).all()


def test_published_column(backend, device):
    """The published operator's mask is the other anchor's column, after its own iterations."""
    import soft_topk_oracle as oracle

    scores = torch.sigmoid(torch.randn(2, 12, dtype=torch.float64))
    expected = oracle.matrix_sinkhorn(scores, 12 - 5, 0.1, 7, anchor=0, normalize=False)
    mask = mf.temporal_mask(scores.to(device), k=5, solver="sinkhorn", iterations=7, backend=backend)
    assert torch.allclose(mask.cpu(), expected, atol=1e-12)

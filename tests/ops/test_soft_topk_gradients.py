"""First and second derivatives in the scores, k, epsilon and the threshold, on every backend."""

from __future__ import annotations

import pytest
import torch
from op_tolerances import GRADIENT

import mmer_fast as mf

DOUBLE = torch.float64


def leaves(rows: int, n: int, device: str = "cpu", dtype: torch.dtype = DOUBLE):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(rows, n, generator=generator, dtype=DOUBLE).to(dtype)
    k = torch.linspace(0.7, 0.8 * n, rows, dtype=DOUBLE)
    epsilon = torch.linspace(0.3, 1.5, rows, dtype=DOUBLE)
    return [t.to(device).requires_grad_() for t in (scores, k, epsilon)]


def weights_and_threshold(backend: str, **options):
    def function(scores, k, epsilon):
        weights, info = mf.soft_topk(scores, k, epsilon=epsilon, return_info=True, backend=backend, **options)
        return weights, info.threshold

    return function


@pytest.mark.parametrize("largest", [True, False])
def test_gradcheck_and_gradgradcheck(backend, device, largest):
    inputs = leaves(2, 4 if backend == "triton" else 6, device)
    function = weights_and_threshold(backend, largest=largest)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradcheck_of_ragged_rows(backend, device):
    scores, k, epsilon = leaves(3, 6, device)
    lengths = torch.tensor([6, 3, 5], device=device)
    k = torch.tensor([2.0, 1.5, 4.2], dtype=DOUBLE, device=device, requires_grad=True)
    function = weights_and_threshold(backend, lengths=lengths)
    assert torch.autograd.gradcheck(function, (scores, k, epsilon))
    if backend != "triton":
        assert torch.autograd.gradgradcheck(function, (scores, k, epsilon))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_equals_the_float64_reference(backend, device, interpreted, dtype):
    n = 33 if interpreted else 700
    scores, k, epsilon = leaves(3, n, device, dtype)
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(3, n, generator=generator, dtype=DOUBLE).to(dtype).to(device)
    lengths = torch.tensor([n, n - 2, n - 5], device=device)

    def gradients(scores, chosen):
        weights = mf.soft_topk(scores, k, epsilon=epsilon, lengths=lengths, backend=chosen)
        return torch.autograd.grad(weights, (scores, k, epsilon), grad.to(scores.dtype))

    actual = gradients(scores, backend)
    exact = scores.detach().double().requires_grad_()
    expected = gradients(exact, "reference")
    assert actual[0].dtype == dtype
    assert actual[1].dtype == actual[2].dtype == DOUBLE
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).abs().max() <= GRADIENT[dtype] * e.abs().max()


def test_rows_of_the_gradient_sum_to_zero(backend, device):
    scores, k, _ = leaves(4, 30, device)
    grad = torch.randn(4, 30, dtype=DOUBLE, device=device)
    (g,) = torch.autograd.grad(mf.soft_topk(scores, k, backend=backend), scores, grad)
    assert g.sum(-1).abs().max() <= 1e-12 * g.abs().max()


def test_hard_selection_has_gradient_zero(backend, device):
    scores = torch.tensor([[1.0, 0.0, 5.0, 3.0], [-2.0, 7.0, 7.0, 1.0]], device=device).repeat(20, 1).requires_grad_()
    k = torch.full((40,), 2.0, device=device, requires_grad=True)
    weights = mf.soft_topk(scores, k, epsilon=1e-4, backend=backend)
    g, g_k = torch.autograd.grad(weights, (scores, k), torch.randn(40, 4, device=device))
    hard = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]).repeat(20, 1)
    assert torch.equal(weights.cpu(), hard)
    assert not g.any()
    assert not g_k.any()


def test_entries_at_the_end_of_all_floats_add_nothing(backend, device):
    """What is so far off in units of tau that float32 cannot say how far, as the scores of a mask are."""
    exact = torch.tensor([[1.5, -0.3, torch.finfo(torch.float32).min]], dtype=DOUBLE, device=device)
    grad = torch.tensor([[1.0, -2.0, 0.5]], dtype=DOUBLE, device=device)

    def gradients(scores, chosen):
        scores, epsilon = scores.requires_grad_(), torch.tensor(0.5, dtype=DOUBLE, device=device, requires_grad=True)
        weights = mf.soft_topk(scores, 0.75, epsilon=epsilon, backend=chosen)
        return torch.autograd.grad(weights, (scores, epsilon), grad.to(scores.dtype))

    expected = gradients(exact, "reference")
    assert expected[1].abs() > 1e-3
    for a, e in zip(gradients(exact.float().detach(), backend), expected, strict=True):
        assert (a.double() - e).abs().max() <= GRADIENT[torch.float32] * e.abs().max()


@pytest.mark.parametrize("k", [0.0, 5.0])
def test_nothing_and_everything_have_gradient_zero(backend, device, k):
    scores = torch.randn(2, 5, device=device, requires_grad=True)
    k_row = torch.full((2,), k, device=device, requires_grad=True)
    epsilon = torch.tensor(0.1, device=device, requires_grad=True)
    weights = mf.soft_topk(scores, k_row, epsilon=epsilon, backend=backend)
    for g in torch.autograd.grad(weights, (scores, k_row, epsilon), torch.randn(2, 5, device=device)):
        assert torch.equal(g.cpu(), torch.zeros_like(g.cpu()))


def test_padding_gets_no_gradient_and_gives_none(backend, device):
    scores = torch.randn(2, 8, device=device)
    scores[0, 5:] = torch.nan
    scores.requires_grad_()
    lengths = torch.tensor([5, 8], device=device)
    grad = torch.randn(2, 8, device=device)
    grad[0, 5:] = torch.nan
    weights = mf.soft_topk(scores, 2, lengths=lengths, backend=backend)
    (g,) = torch.autograd.grad(weights, scores, grad)
    assert (g[0, 5:] == 0).all()
    assert g.isfinite().all()


def test_gradient_of_strided_views(backend, device):
    base = torch.randn(12, 9, dtype=DOUBLE, device=device)
    grad = torch.randn(9, 12, dtype=DOUBLE, device=device).t()
    first, second = base.clone().requires_grad_(), base.clone().requires_grad_()
    mf.soft_topk(first.t()[::2, 1:], 4, backend=backend).backward(grad.t()[::2, 1:])
    mf.soft_topk(second.t()[::2, 1:].contiguous(), 4, backend="reference").backward(grad.t()[::2, 1:].contiguous())
    assert torch.allclose(first.grad, second.grad, rtol=1e-9, atol=1e-12)


def test_threshold_alone_may_carry_the_gradient(backend, device):
    scores, k, epsilon = leaves(2, 7, device)
    info = mf.soft_topk(scores, k, epsilon=epsilon, return_info=True, backend=backend)[1]
    (g,) = torch.autograd.grad(info.threshold.sum(), scores)
    assert torch.allclose(g.sum(-1), torch.ones(2, dtype=DOUBLE, device=device))  # lambda moves with the row


def test_sinkhorn_has_the_implicit_gradient(backend, device):
    scores, k, epsilon = leaves(2, 8, device)
    grad = torch.randn(2, 8, dtype=DOUBLE, device=device)
    epsilon = (epsilon * 4).detach()

    def gradient(**solver):
        return torch.autograd.grad(mf.soft_topk(scores, k, epsilon=epsilon, backend=backend, **solver), scores, grad)[0]

    sinkhorn, newton = gradient(solver="sinkhorn", iterations=200), gradient()
    assert (sinkhorn - newton).abs().max() <= 1e-9 * newton.abs().max()

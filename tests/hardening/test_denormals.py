"""Subnormal numbers, kept and flushed to zero (`torch.set_flush_denormal`, what many turn on for speed).

A flushed input counts as 0: each result is held to that of the reference, either on what was given or on that with 0
for its subnormal numbers. Bits that are copied, as those of perturbed weights, are never flushed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmer_fast as mf
from mmer_fast import ops
from mmer_fast.ops import dropout_add_layer_norm  # noqa: F401  defines its operators
from mmer_fast.ops.dropout import wide

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-11, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# As soft_topk_solver.h has them.
LEAST_TEMPERATURE = {torch.float32: 1.5e-38, torch.float64: 1.5e-300}


@pytest.fixture(params=[False, True], ids=["kept", "flushed"])
def flush(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether subnormal numbers are flushed, in this thread; one thread, so that it does all the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor cannot flush subnormal numbers to zero")
    yield request.param
    torch.set_flush_denormal(False)
    torch.set_num_threads(before)


def subnormal(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` within [-1, 1] times the smallest normal number of the dtype."""
    with_subnormals = torch.set_flush_denormal(False)
    assert with_subnormals
    return (values.double() * torch.finfo(dtype).smallest_normal).to(dtype)


def made(flush: bool, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Subnormal numbers, made before they may be flushed."""
    result = subnormal(values, dtype)
    torch.set_flush_denormal(flush)
    return result


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [0.1, 1e-40, 1e-300])
def test_soft_topk_of_subnormal_scores(flush: bool, dtype: torch.dtype, epsilon: float) -> None:
    """A choice among scores that hardly differ: equal weights where epsilon is above them, and else as soft as the
    least temperature makes it, which for the scores of float16 is the hard choice."""
    plain = subnormal(torch.linspace(-0.9, 0.9, 12), dtype)[None]
    least = 2 * LEAST_TEMPERATURE[torch.float64 if dtype == torch.float64 else torch.float32]
    expected = mf.soft_topk(plain.double(), 3, epsilon=max(epsilon, least), backend="reference")
    scores = made(flush, torch.linspace(-0.9, 0.9, 12), dtype)[None].requires_grad_()
    weights, info = mf.soft_topk(scores, 3, epsilon=epsilon, return_info=True)
    assert float(weights.detach().double().sum()) == pytest.approx(3, abs=12 * TOLERANCE[dtype])
    assert bool((weights.diff() >= 0).all())
    assert bool((weights >= 0).all() & (weights <= 1).all())
    assert float(info.residual.detach().abs()) <= 1e-5
    error, as_of_0 = (float((weights.detach().double() - x).abs().max()) for x in (expected, 0.25))
    assert (min(error, as_of_0) if flush else error) <= 4 * TOLERANCE[dtype]
    (gradient,) = torch.autograd.grad(weights.double().square().sum(), scores)
    assert not gradient.isnan().any()


def test_soft_topk_tells_subnormal_scores_apart() -> None:
    """Unless they are flushed, scores of 10^-39 are as good as others."""
    scores = subnormal(torch.linspace(-0.9, 0.9, 12), torch.float32)[None]
    unit = scores.double() / torch.finfo(torch.float32).smallest_normal
    for epsilon in (0.5, 4.0):
        got = mf.soft_topk(scores, 3, epsilon=epsilon * torch.finfo(torch.float32).smallest_normal)
        # The least temperature of float32 is 1.5e-38, of these units 1.28.
        expected = mf.soft_topk(unit, 3, epsilon=max(epsilon, 2 * 1.2762), backend="reference")
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_with_subnormal_entries(flush: bool, dtype: torch.dtype) -> None:
    """q and k whose products vanish, v and gradients that are subnormal: softmax is uniform, nothing is NaN."""
    q, k, v = (torch.randn(1, 2, 9, 8).clamp(-3, 3) / 3 for _ in range(3))
    q, k, v = (made(flush, x, dtype).requires_grad_() for x in (q, k, v))
    out = mf.masked_attention(q, k, v)
    assert isinstance(out, Tensor)
    smallest = torch.finfo(dtype).smallest_normal
    assert out.detach().abs().max() <= smallest  # of the values, which flushed are 0
    if not flush:
        mean = v.detach().double().mean(2, keepdim=True).expand_as(out)
        assert (out.detach().double() - mean).abs().max() <= torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for gradient in torch.autograd.grad(out, (q, k, v), made(flush, torch.rand_like(out), dtype)):
        assert gradient.isfinite().all()
        assert gradient.abs().max() <= 18 * smallest


@pytest.mark.parametrize("exact", [False, True])
def test_subnormal_key_weights(flush: bool, exact: bool) -> None:
    """A weight of 10^-40 is that or 0: both give the same output, and a gradient that is one of the two."""
    q, k, v = (torch.randn(1, 1, 5, 4) for _ in range(3))
    weights = torch.tensor([[1.0, 0.0, 0.5, 0.0, 1.0]])
    tiny = weights + made(flush, torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.0]]), torch.float32)
    weights.requires_grad_(), tiny.requires_grad_()
    expected = mf.masked_attention(q, k, v, weights, exact_zero_weight_grad=True, backend="reference")
    out = mf.masked_attention(q, k, v, tiny, exact_zero_weight_grad=exact)
    assert isinstance(out, Tensor)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    (gradient,) = torch.autograd.grad(out.square().sum(), tiny)
    (true,) = torch.autograd.grad(expected.square().sum(), weights)
    excluded = true.masked_fill(weights == 0, 0)
    nearest = torch.minimum((gradient - true).abs(), (gradient - excluded).abs())
    assert nearest.max() <= 1e-5 * true.abs().max()
    if exact or not flush:
        torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-5)


def test_attention_whose_weights_underflow(flush: bool) -> None:
    """Scores 80 to 110 apart, where e^x is subnormal: these entries are 0 or next to it."""
    x = torch.tensor([0.0, -80.0, -88.0, -95.0, -103.0, -110.0])
    q, k, v = torch.ones(1, 1, 1, 1), x.view(1, 1, 6, 1), torch.randn(1, 1, 6, 1)
    q.requires_grad_(), k.requires_grad_()
    out, lse = mf.masked_attention(q, k, v, scale=1.0, return_lse=True)
    torch.testing.assert_close(out.flatten(), v.flatten()[:1], rtol=0, atol=1e-6)
    assert float(lse.detach()) == pytest.approx(0, abs=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum() + lse.sum(), (q, k)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturbation_keeps_subnormal_weights(flush: bool, dtype: torch.dtype) -> None:
    """What is stashed and restored are bits."""
    w = made(flush, torch.randn(3000).clamp(-3, 3) / 3, dtype)
    before, gradient, stash = w.clone(), torch.randn(3000).to(dtype), torch.empty_like(w)
    assert torch.equal(bits(w), bits(before))
    ops.perturb_([w], [gradient], [stash], 0.5)
    assert torch.equal(bits(stash), bits(before))
    assert float(w.double().norm()) == pytest.approx(0.5, rel=1e-2)
    ops.restore_([w], [stash])
    assert torch.equal(bits(w), bits(before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_of_tiny_gradients(flush: bool, dtype: torch.dtype) -> None:
    """Normal numbers whose squares are not even subnormal, and subnormal ones: a norm, or 0 where they are flushed."""
    smallest = torch.finfo(dtype).smallest_normal
    tiny = [(torch.rand(2000, dtype=torch.float64) + 1).mul(4 * smallest).to(dtype)]
    torch.set_flush_denormal(flush)
    assert float(ops.grad_norm(tiny)) == pytest.approx(float(tiny[0].double().norm()), rel=1e-6)
    below = made(False, torch.rand(2000) / 2 + 0.25, dtype)
    expected = float(below.double().div(smallest).norm()) * smallest
    torch.set_flush_denormal(flush)
    norm = float(ops.grad_norm([below]))
    assert norm == pytest.approx(expected, rel=1e-6) or (flush and norm == 0)


def nearest(got: Tensor, *expected: Tensor) -> float:
    """The largest distance of an entry to the nearest of those expected."""
    return float(torch.stack([(got.double() - x).abs() for x in expected]).amin(0).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_subnormal_numbers(flush: bool, dtype: torch.dtype) -> None:
    """What is kept is divided by the share that is kept, as exactly as subnormal numbers are; or 0, if flushed."""
    plain, seed, ones = subnormal(torch.rand(4, 24) - 0.5, dtype), torch.tensor([5]), torch.ones(4, 24)
    mask = torch.ops.mmer_fast.dropout(ones.double(), 0.25, seed)
    torch.set_flush_denormal(flush)
    dropped = torch.ops.mmer_fast.dropout(plain, 0.25, seed)
    rectified = torch.ops.mmer_fast.relu_dropout(plain, None, 0.25, seed)
    torch.set_flush_denormal(False)
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for got, x in ((dropped, plain.double()), (rectified, plain.double().relu())):
        exact = x * mask
        assert exact.any()
        assert nearest(got, exact, *([torch.zeros_like(exact)] if flush else [])) <= spacing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_dropout_and_layer_norm_of_subnormal_rows(flush: bool, dtype: torch.dtype, p: float) -> None:
    """Their variance is nothing beside eps: y is x - mean(x) over its root, or 0; the gradient is the same for both."""
    plain, seed, ones = subnormal(0.9 * torch.rand(4, 24), dtype), torch.tensor([5]), torch.ones(4, 24)
    upstream = torch.randn(4, 24).to(dtype)
    mask = torch.ops.mmer_fast.dropout(ones.double(), p, seed) if p > 0 else ones.double()
    exact_x = plain.double().requires_grad_()
    exact = F.layer_norm(exact_x * mask, (24,), eps=1e-5)
    (exact_gradient,) = torch.autograd.grad(exact, exact_x, upstream.double())

    x, row, zero = plain.requires_grad_(), torch.ones(24).to(wide(plain)), torch.zeros(4, 24).to(dtype)
    torch.set_flush_denormal(flush)
    norm = torch.ops.mmer_fast.dropout_add_layer_norm
    y = norm(x, None, zero, row, torch.zeros_like(row), 1e-5, p, seed if p > 0 else None)[0]
    (gradient,) = torch.autograd.grad(y, x, upstream)
    torch.set_flush_denormal(False)
    exact, largest = exact.detach(), float(exact.detach().abs().max())
    assert largest > torch.finfo(dtype).smallest_normal
    assert nearest(y.detach(), exact, *([torch.zeros_like(exact)] if flush else [])) <= 4 * TOLERANCE[dtype] * largest
    assert nearest(gradient, exact_gradient) <= 4 * TOLERANCE[dtype] * float(exact_gradient.abs().max())

"""The mathematics of attention with weights, on inputs that hypothesis draws; and half types beside plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import qkv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmer_fast as mf

SIZES = (1, 2, 7, 17, 129)
EXAMPLES = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and weights m > 0, float32."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    queries, keys = draw(st.sampled_from(SIZES[:4])), draw(st.sampled_from(SIZES))
    width, scale = draw(st.sampled_from((1, 5, 16))), draw(st.sampled_from((0.1, 1.0, 4.0)))
    q = scale * torch.randn(2, 2, queries, width, generator=generator)
    k, v = (torch.randn(2, 2, keys, width, generator=generator) for _ in range(2))
    return q, k, v, torch.rand(2, keys, generator=generator) + 1e-3


def on(backend: str, device: str, *tensors: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    out, lse = mf.masked_attention(*(x.to(device) for x in tensors), return_lse=True, backend=backend, **options)
    return out.cpu(), lse.cpu()


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=2e-5)


@EXAMPLES
@given(problem=problems())
def test_outputs_are_means_of_the_values(backend, device, interpreted, problem):
    q, k, v, m = problem
    if interpreted and max(q.shape[2], k.shape[2]) > 7:
        return
    out, _ = on(backend, device, q, k, v, m)
    low, high = v.amin(2, keepdim=True), v.amax(2, keepdim=True)
    assert ((out >= low - 1e-5) & (out <= high + 1e-5)).all()


@EXAMPLES
@given(problem=problems(), shift=st.floats(-20, 20), factor=st.floats(0.01, 1))
def test_a_constant_in_the_scores_or_a_factor_of_the_weights_moves_lse_alone(
    backend, device, interpreted, problem, shift, factor
):
    q, k, v, m = problem
    if interpreted and max(q.shape[2], k.shape[2]) > 7:
        return
    out, lse = on(backend, device, q, k, v, m)
    bias = torch.full((1, 1, 1, k.shape[2]), shift, device=device)
    moved, moved_lse = on(backend, device, q, k, v, factor * m, bias=bias)
    assert near(moved, out)
    assert near(moved_lse, lse + shift + math.log(factor))


@EXAMPLES
@given(problem=problems())
def test_the_order_of_the_keys_does_not_matter(backend, device, interpreted, problem):
    q, k, v, m = problem
    if interpreted and max(q.shape[2], k.shape[2]) > 7:
        return
    order = torch.randperm(k.shape[2])
    out, lse = on(backend, device, q, k, v, m)
    turned, turned_lse = on(backend, device, q, k[:, :, order], v[:, :, order], m[:, order])
    assert near(turned, out)
    assert near(turned_lse, lse)


@EXAMPLES
@given(problem=problems())
def test_the_gradient_of_the_weights_knows_that_their_scale_is_free(backend, device, interpreted, problem):
    """o does not change with a factor of m, so sum_j m_j dL/dm_j = 0 for a loss of o; for lse it is the number of
    queries.
    """
    q, k, v, m = (x.to(device) for x in problem)
    if interpreted and max(q.shape[2], k.shape[2]) > 7:
        return
    m.requires_grad_()
    out, lse = mf.masked_attention(q, k, v, m, return_lse=True, backend=backend)
    of_out, of_lse = (torch.autograd.grad(x.sum(), m, retain_graph=True)[0] for x in (out, lse))
    size = float((m * of_out).abs().sum().detach()) + 1
    assert float((m * of_out).sum(1).abs().max().detach()) <= 1e-4 * size
    assert near((m * of_lse).sum(1).cpu(), torch.full((2,), float(lse[0].numel())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "keys", "width"), [(17, 49, 64), (129, 1134, 64), (64, 200, 128)])
def test_half_types_err_no_more_than_twice_as_much_as_plain_pytorch(
    backend, device, interpreted, dtype, queries, keys, width
):
    if interpreted and queries > 20:
        pytest.skip("too slow in the interpreter")
    inputs = qkv(dtype, 2, 2, 2, queries, keys, width, device)
    cotangent = torch.randn(inputs[0].shape, device=device).to(dtype)

    def run(attention, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = attention(*leaves)
        grads = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
        return [x.detach().double() for x in (out, *grads)]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * width**-0.5).softmax(-1) @ v

    truth = run(plain, tuple(x.double() for x in inputs))
    ours, theirs = run(lambda *x: mf.masked_attention(*x, backend=backend), inputs), run(plain, inputs)
    for got, other, expected in zip(ours, theirs, truth, strict=True):
        assert (got - expected).abs().max() <= 2 * (other - expected).abs().max() + 1e-6

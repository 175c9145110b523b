from __future__ import annotations

import pytest
import torch

import mmer_fast as mf


def test_identity_forward_reversed_backward():
    x = torch.randn(3, 4, requires_grad=True)
    y = mf.grad_reverse(x, 0.25)
    assert torch.equal(y, x)
    grad = torch.randn(3, 4)
    y.backward(grad)
    assert torch.equal(x.grad, -0.25 * grad)


def test_second_derivative():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(mf.grad_reverse(x).pow(3).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    assert torch.allclose(h, 6 * x)  # reversed twice


def test_transforms_and_compile():
    x = torch.randn(2, 3)
    expected = -2 * x
    assert torch.allclose(torch.func.grad(lambda t: mf.grad_reverse(t).square().sum())(x), expected)
    assert torch.allclose(torch.vmap(torch.func.grad(lambda t: mf.grad_reverse(t).square().sum()))(x), expected)
    leaf = x.clone().requires_grad_()
    torch.compile(lambda t: mf.grad_reverse(t).square().sum(), fullgraph=True, backend="aot_eager")(leaf).backward()
    assert torch.allclose(leaf.grad, expected)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "x must be float32", (torch.ones(2, dtype=torch.long),)),
        (ValueError, "scale must be within", (torch.ones(2), -1.0)),
        (ValueError, "scale must be finite", (torch.ones(2), float("inf"))),
        (TypeError, "scale must be a number", (torch.ones(2), "1")),
    ],
)
def test_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        mf.grad_reverse(*arguments)

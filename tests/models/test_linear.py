"""The linear layer of the models: that of torch, whichever of its matrix products computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmer_fast.models.linear import Linear, joint_linear
from mmer_fast.ops import linear as module
from mmer_fast.ops.self_attention import self_attention

ONEDNN = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"
)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Takes oneDNN for every size and on every processor; returns the shapes that it multiplies from now on."""
    shapes = []
    product = module._product
    monkeypatch.setattr(module, "_SLOW_WITH_MKL", True)
    monkeypatch.setattr(module, "_FEWEST_PRODUCTS", 0)
    monkeypatch.setattr(module, "_product", lambda x, *rest: shapes.append(tuple(x.shape)) or product(x, *rest))
    return shapes


@pytest.fixture
def onednn_gradients(onednn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN also for the gradients of weight and bias, of every size; returns the shapes of those of the weight."""
    shapes = []
    gradients = module._gradients_of_parameters
    monkeypatch.setattr(module, "_FEWEST_GRADIENT_PRODUCTS", 0)
    monkeypatch.setattr(
        module, "_gradients_of_parameters", lambda *of: shapes.append(tuple(of[2].shape)) or gradients(*of)
    )
    return shapes


def run(layer: Linear, x: Tensor, grad: Tensor) -> list[Tensor]:
    out = layer(x)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)]


@ONEDNN
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_it_is_the_layer_of_torch(onednn: list[tuple[int, ...]], rows: int, bias: bool) -> None:
    layer, x, grad = Linear(33, 20, bias=bias), torch.randn(rows, 33, requires_grad=True), torch.randn(rows, 20)
    got = run(layer, x, grad)
    assert onednn == [(rows, 33), (rows, 20)]  # the gradient of this small weight is not among them
    out = torch.nn.functional.linear(x, layer.weight, layer.bias)
    expected = [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@ONEDNN
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 130])
@pytest.mark.parametrize("view", ["whole", "every other column", "transposed"])
def test_gradients_of_weight_and_bias_by_onednn(
    onednn_gradients: list[tuple[int, ...]], rows: int, bias: bool, view: str
) -> None:
    views = {
        "whole": lambda n, m: torch.randn(n, m),
        "every other column": lambda n, m: torch.randn(n, 2 * m + 1)[:, 1::2],
        "transposed": lambda n, m: torch.randn(m, n).T,
    }
    layer, x, grad = Linear(33, 20, bias=bias), views[view](rows, 33).requires_grad_(), views[view](rows, 20)
    got = run(layer, x, grad)
    assert onednn_gradients == [(20, 33)]
    assert not any(y.is_mkldnn for y in got)
    out = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    expected = [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad.double())]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)
    again = run(layer, x, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@ONEDNN
def test_the_gradients_of_self_attention_by_onednn(onednn_gradients: list[tuple[int, ...]]) -> None:
    ends = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    given = [torch.randn(9, 12), torch.randn(24, 12), torch.randn(24)]
    grad, found = torch.randn(9, 8), []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        out = self_attention(*leaves, heads=2, cu_seqlens=ends, longest=5)
        found.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    assert onednn_gradients == [(24, 12)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


@ONEDNN
@pytest.mark.parametrize("other", ["frozen", "create_graph", "vmap", "small"])
def test_gradients_that_onednn_does_not_serve(
    onednn_gradients: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    layer, x = Linear(8, 5), torch.randn(3, 8, requires_grad=True)
    if other == "frozen":
        layer.weight.requires_grad_(False)
        layer(x).sum().backward()
        torch.testing.assert_close(layer.bias.grad, torch.full((5,), 3.0))
        assert layer.weight.grad is None
    elif other == "create_graph":
        assert torch.autograd.grad(layer(x).sum(), layer.weight, create_graph=True)[0].requires_grad
    elif other == "vmap":
        out, grads = layer(x), torch.randn(4, 3, 5)
        (got,) = torch.autograd.grad(out, layer.weight, grads, is_grads_batched=True)
        torch.testing.assert_close(got, grads.transpose(1, 2) @ x.detach())
    else:
        monkeypatch.setattr(module, "_FEWEST_GRADIENT_PRODUCTS", 3 * 8 * 5 + 1)
        layer(x).sum().backward()
    assert onednn_gradients == []


@ONEDNN
def test_the_sum_without_its_bias(onednn: list[tuple[int, ...]]) -> None:
    layer, x = Linear(8, 5), torch.randn(3, 8)
    torch.testing.assert_close(layer.without_bias(x) + layer.bias, layer(x))


@pytest.mark.parametrize("widths", [[20], [20, 3], [5, 1, 7]])
def test_several_layers_as_one(widths: list[int]) -> None:
    layers = [Linear(33, width).double() for width in widths]
    x = torch.randn(6, 33, dtype=torch.float64, requires_grad=True)
    grads = [torch.randn(6, width, dtype=torch.float64) for width in widths]
    leaves = [x, *(parameter for layer in layers for parameter in layer.parameters())]
    got, expected = joint_linear(x, layers), [layer(x) for layer in layers]
    assert [tuple(out.shape) for out in got] == [(6, width) for width in widths]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(got, leaves, grads), torch.autograd.grad(expected, leaves, grads), strict=True):
        torch.testing.assert_close(a, b)


@ONEDNN
def test_what_is_frozen_costs_nothing(onednn: list[tuple[int, ...]]) -> None:
    layer, x = Linear(8, 5).requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert onednn == [(3, 8), (3, 5)]
    assert layer.weight.grad is None


@ONEDNN
def test_second_derivatives(onednn: list[tuple[int, ...]]) -> None:
    layer, x = Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    second = []
    for function in (layer, lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)):
        first = torch.autograd.grad(function(x).sin().sum(), [x, layer.weight], create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, layer.weight, layer.bias]))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@ONEDNN
@pytest.mark.parametrize("other", ["float64", "autocast", "switched off", "compiled", "vmap", "3 dimensions"])
def test_torch_computes_what_onednn_does_not_serve(onednn: list[tuple[int, ...]], other: str) -> None:
    layer, x = Linear(8, 5), torch.randn(3, 8)
    if other == "float64":
        layer.double()(x.double())
    elif other == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    elif other == "switched off":
        kept = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            layer(x)
        finally:
            torch._C._set_mkldnn_enabled(kept)
    elif other == "compiled":
        torch.compiler.reset()
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    elif other == "vmap":
        torch.func.vmap(layer)(x)
    else:
        layer(x[None])
    assert onednn == []
    layer.float()(x)
    assert onednn == [(3, 8)]


def test_small_products_are_not_worth_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLOW_WITH_MKL", True)
    small, large = torch.randn(16, 128), torch.randn(512, 128)
    weight = torch.randn(128, 128)
    assert not module._is_faster(small, weight)
    assert module._is_faster(large, weight)
    monkeypatch.setattr(module, "_SLOW_WITH_MKL", False)
    assert not module._is_faster(large, weight)

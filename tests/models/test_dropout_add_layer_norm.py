"""Dropout, residual and LayerNorm in one: values and gradients, the mask, threads, and PyTorch around it."""

from __future__ import annotations

import itertools

import pytest
import torch
from dropout_oracle import DTYPES, assert_near, layer_norm, mask, next_seed
from torch import Tensor

from mmer_fast.ops import dropout_add_layer_norm as module
from mmer_fast.ops.dropout import wide
from mmer_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm

OPERATOR = torch.ops.mmer_fast.dropout_add_layer_norm.default
BACKWARD = torch.ops.mmer_fast.dropout_add_layer_norm_backward.default
SHAPES = [(5, 1), (3, 7), (1, 64), (37, 128), (2, 3, 130), (4, 1134), (0, 16), (600, 24)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, x_bias, residual, weight, bias; all require gradients."""
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x_bias, weight, bias = (torch.randn(shape[-1]).to(wide(x)) for _ in range(3))
    return [tensor.requires_grad_() for tensor in (x, x_bias, residual, weight + 1, bias)]


def run(tensors: list[Tensor], p: float, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = dropout_add_layer_norm(*tensors, 1e-5, p)
    return out, torch.autograd.grad(out, tensors, grad)


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(DTYPES, SHAPES)), ids=str)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], p: float) -> None:
    tensors = leaves(inputs(shape, dtype))
    grad = torch.randn(shape).to(dtype)
    keep = mask(shape, p, next_seed(p))
    out, grads = run(tensors, p, grad)
    wide_tensors = [x.detach().double().requires_grad_() for x in tensors]
    expected = layer_norm(*wide_tensors, keep)
    assert out.dtype == dtype
    assert_near(out, expected, dtype)
    for got, other in zip(grads, torch.autograd.grad(expected, wide_tensors, grad.double()), strict=True):
        assert_near(got, other, dtype)


def test_strides_and_a_mixed_residual() -> None:
    x, x_bias, residual, weight, bias = leaves(inputs((6, 8), torch.bfloat16))
    strided = residual.detach().float().T.contiguous().T.requires_grad_()
    seed = next_seed(0.2)
    out, grads = run([x, x_bias, strided, weight, bias], 0.2, torch.ones(8, 6).T)
    expected = layer_norm(*(t.double() for t in (x, x_bias, strided, weight, bias)), mask((6, 8), 0.2, seed))
    assert out.dtype == torch.float32
    assert_near(out, expected, torch.float32)
    assert [g.dtype for g in grads] == [torch.bfloat16] + [torch.float32] * 4


def test_no_bias_of_x() -> None:
    x, _, residual, weight, bias = leaves(inputs((3, 5)))
    expected = layer_norm(x, None, residual, weight, bias, mask((3, 5), 0.3, next_seed(0.3)))
    assert_near(dropout_add_layer_norm(x, None, residual, weight, bias, 1e-5, 0.3), expected, torch.float64)


def test_nothing_is_drawn_without_dropout() -> None:
    tensors = inputs((3, 5))
    state = torch.get_rng_state()
    dropout_add_layer_norm(*tensors, 1e-5, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    dropout_add_layer_norm(*tensors, 1e-5, 0.1)
    assert not torch.equal(torch.get_rng_state(), state)


def test_threads_do_not_change_a_bit() -> None:
    tensors, grad = inputs((3000, 40), torch.float32), torch.randn(3000, 40)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            torch.manual_seed(5)
            out, grads = run(leaves(tensors), 0.1, grad)
            results.append([out, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_nan_stays_in_its_row() -> None:
    tensors = inputs((5, 70), torch.float32)
    with torch.no_grad():
        tensors[0][2, 3] = torch.nan
    out, grads = run(leaves(tensors), 0.1, torch.ones(5, 70))
    for rows in (out, grads[0], grads[2]):
        assert rows[2].isnan().all()
        assert rows[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_derivatives_of_both_orders(p: float) -> None:
    tensors = tuple(inputs((4, 5)))
    seed = torch.tensor([7])

    def function(*values: Tensor) -> Tensor:
        return module._NORM(*values, 1e-5, p, seed if p > 0 else None)[0]

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(p: float) -> None:
    tensors, seed = inputs((4, 6), torch.float32), torch.tensor([7]) if p > 0 else None
    torch.library.opcheck(OPERATOR, (*tensors, 1e-5, p, seed))
    x, x_bias, residual, weight, bias = (t.detach() for t in tensors)
    y, moments = OPERATOR(x, x_bias, residual, weight, bias, 1e-5, p, seed)
    torch.library.opcheck(BACKWARD, (torch.randn_like(y), x, x_bias, residual, weight, moments, p, seed))


def test_one_graph_for_the_compiler() -> None:
    torch.compiler.reset()
    tensors = inputs((4, 6))
    compiled = torch.compile(dropout_add_layer_norm, fullgraph=True, backend="aot_eager")
    results = []
    for function in (dropout_add_layer_norm, compiled):
        torch.manual_seed(1)
        out = function(*tensors, 1e-5, 0.2)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_vmap_takes_one_call_after_another() -> None:
    x, x_bias, residual, weight, bias = (t.detach() for t in inputs((3, 2, 6)))
    function = torch.func.vmap(lambda a, b: module._NORM(a, x_bias, b, weight, bias, 1e-5, 0.0, None)[0])
    assert torch.equal(function(x, residual), dropout_add_layer_norm(x, x_bias, residual, weight, bias, 1e-5, 0.0))


def test_without_a_kernel_it_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, grad = inputs((3, 5)), torch.randn(3, 5, dtype=torch.float64)
    expected = run(tensors, 0.0, grad)
    monkeypatch.setattr(module, "has_kernel", lambda _: False)
    out, grads = run(tensors, 0.0, grad)
    assert_near(out, expected[0], torch.float64)
    for a, b in zip(grads, expected[1], strict=True):
        assert_near(a, b, torch.float64)
    torch.manual_seed(3)
    dropped = dropout_add_layer_norm(*tensors, 1e-5, 0.5)
    torch.manual_seed(3)
    keep = torch.nn.functional.dropout(torch.ones(3, 5, dtype=torch.float64), 0.5)
    assert_near(dropped, layer_norm(*tensors, keep), torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(4, 6)}, "residual must have the shape, dtype and device of x"),
        ({1: torch.randn(5)}, r"x_bias must have shape \(D,\) = \(6,\)"),
        ({3: torch.randn(6, 1)}, r"weight must have shape \(D,\) = \(6,\)"),
        ({7: torch.tensor([1.5])}, "seed must be an int64 tensor"),
        ({7: None}, "seed must be an int64 tensor"),
        ({6: 1.0}, r"p must be within \[0, 1\)"),
    ],
    ids=["residual", "x_bias", "weight", "floating seed", "no seed", "p"],
)
def test_what_the_operator_refuses(change: dict[int, object], message: str) -> None:
    arguments = [*(t.detach() for t in inputs((3, 6), torch.float32)), 1e-5, 0.1, torch.tensor([1])]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        OPERATOR(*arguments)

"""Dropout whose mask is drawn again: share, mean, seeds, gradients; after a ReLU too."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from dropout_oracle import DTYPES, assert_near, mask, next_seed

from mmer_fast.models.dropout import Dropout
from mmer_fast.models.transformer import FeedForward
from mmer_fast.ops import dropout as module
from mmer_fast.ops.dropout import dropout, relu_dropout, wide

SHAPES = [(), (1,), (7,), (5, 3), (40, 128), (3, 1134), (0, 4), (4001,), (2000, 150)]


def test_it_keeps_the_right_share_and_the_mean() -> None:
    x = torch.ones(400_000)
    out = Dropout(0.1)(x)
    values = out.unique()
    assert len(values) == 2
    assert values[0] == 0
    torch.testing.assert_close(values[1].item(), 1 / 0.9, rtol=2e-5, atol=0)
    # five standard deviations of a share of 0.1 over 400 000 elements
    assert abs((out == 0).double().mean().item() - 0.1) < 5 * math.sqrt(0.09 / 400_000)


def test_it_draws_neighbours_independently() -> None:
    dropped = Dropout(0.5)(torch.ones(100_000)) == 0
    for lag in (1, 2, 3, 4, 8, 16):
        both = (dropped[:-lag] & dropped[lag:]).double().mean().item()
        assert abs(both - 0.25) < 0.01


def test_it_follows_the_seed_and_passes_gradients_of_what_it_kept() -> None:
    x = torch.randn(7, 5, 3, requires_grad=True)
    drop = Dropout(0.3)
    torch.manual_seed(3)
    first = drop(x)
    torch.manual_seed(3)
    assert torch.equal(first, drop(x))
    assert not torch.equal(first, drop(x))
    first.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, first == 0)


def test_it_is_the_identity_in_evaluation() -> None:
    x = torch.randn(9)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(DTYPES, SHAPES)), ids=str)
def test_the_mask_is_that_of_the_seed(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, grad = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    expected = mask(shape, 0.3, next_seed(0.3))
    out = dropout(x, 0.3)
    assert out.dtype == dtype
    assert_near(out, x.detach().double() * expected, dtype)
    assert_near(torch.autograd.grad(out, x, grad)[0], grad.double() * expected, dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(DTYPES, SHAPES[1:])), ids=str)
def test_relu(dtype: torch.dtype, shape: tuple[int, ...], p: float) -> None:
    x, grad = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    bias = torch.randn(shape[-1]).to(wide(x)).requires_grad_()
    factor = mask(shape, p, next_seed(p)) * (x.detach().double() + bias.detach().double() > 0)
    out = relu_dropout(x, bias, p)
    grad_x, grad_bias = torch.autograd.grad(out, (x, bias), grad)
    assert out.dtype == dtype
    assert_near(out, (x.detach().double() + bias.detach().double()) * factor, dtype)
    assert_near(grad_x, grad.double() * factor, dtype)
    assert_near(grad_bias, (grad.double() * factor).reshape(-1, shape[-1]).sum(0), dtype)


def test_nothing_is_drawn_without_dropout() -> None:
    state = torch.get_rng_state()
    relu_dropout(torch.randn(4, 3, generator=torch.Generator()), None, 0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_nan_is_not_hidden() -> None:
    x = torch.full((1000,), torch.nan)
    assert dropout(x, 0.5).isnan().all()
    assert relu_dropout(x, None, 0.5).isnan().all()


def test_threads_do_not_change_a_bit() -> None:
    x, bias = torch.randn(3001, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(5)
            out = relu_dropout(x, bias, 0.1) + dropout(x, 0.2)
            results.append([out, *torch.autograd.grad(out.sin().sum(), (x, bias))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_derivatives_of_both_orders() -> None:
    x, bias = torch.randn(4, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    seed = torch.tensor([7])
    for function, arguments in (
        (lambda x: module._DROPOUT(x, 0.3, seed), (x,)),
        (lambda x, bias: module._RELU_DROPOUT(x, bias, 0.3, seed), (x, bias)),
        (lambda x: module._RELU_DROPOUT(x, None, 0.0, None), (x,)),
    ):
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


def test_opcheck() -> None:
    x, bias, seed = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True), torch.tensor([7])
    operators = torch.ops.mmer_fast
    torch.library.opcheck(operators.dropout.default, (x, 0.3, seed))
    torch.library.opcheck(operators.relu_dropout.default, (x, bias, 0.3, seed))
    torch.library.opcheck(operators.relu_dropout.default, (x, None, 0.0, None))
    torch.library.opcheck(operators.relu_dropout_backward.default, (x.detach(), x.detach().relu(), 0.3))


def test_one_graph_for_the_compiler() -> None:
    torch.compiler.reset()
    layers = FeedForward(4, 6, 0.2)
    x = torch.randn(5, 4, requires_grad=True)
    results = []
    for function in (layers, torch.compile(layers, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        out = function(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_feed_forward_layers_are_those_of_the_sequence() -> None:
    layers = FeedForward(4, 6, 0.5).eval()
    x = torch.randn(5, 4)
    torch.testing.assert_close(layers(x), torch.nn.Sequential(*layers)(x))
    assert list(layers.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_without_a_kernel_it_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMPILED", False)
    x, bias = torch.randn(50, 4), torch.randn(4)
    for ours, theirs in (
        (lambda: dropout(x, 0.3), lambda: torch.nn.functional.dropout(x, 0.3)),
        (lambda: relu_dropout(x, bias, 0.3), lambda: torch.nn.functional.dropout((x + bias).relu(), 0.3)),
    ):
        torch.manual_seed(2)
        got = ours()
        torch.manual_seed(2)
        assert torch.equal(got, theirs())

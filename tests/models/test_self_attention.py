"""Self-attention by way of one product: the public operator's result and gradients, whichever way they are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast.ops import self_attention as module
from mmer_fast.ops._library import operator_of
from mmer_fast.ops.self_attention import self_attention

KERNEL = "mmer_fast::self_attention_backward"
COMPILED = pytest.mark.skipif(
    mf.backends()["packed_attention"]["cpu"] != "available", reason="the compiled library is not there"
)


def apart(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    """The same by the public operator."""
    return module._apart(x, weight, bias, module._Heads(*rest))


class Case:
    """Tokens of samples of `lengths`, and a layer of `heads` heads."""

    def __init__(self, lengths: list[int], heads: int = 2, width: int = 4, dtype: torch.dtype = torch.float32) -> None:
        self.heads, self.longest = heads, max(lengths, default=0)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        self.x = torch.randn(sum(lengths), 8).to(dtype).requires_grad_()
        self.weight = (0.3 * torch.randn(3 * heads * width, 8)).to(dtype).requires_grad_()
        self.bias = torch.randn(3 * heads * width).to(dtype).requires_grad_()
        self.grad = torch.randn(sum(lengths), heads * width).to(dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias]

    def rest(self, dropout_p: float = 0.0) -> tuple:
        return self.heads, self.cu_seqlens, self.longest, dropout_p, torch.tensor([7]) if dropout_p else None

    def run(self, function=self_attention, dropout_p: float = 0.0) -> list[Tensor]:
        out = function(*self.leaves, *self.rest(dropout_p))
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.grad.to(out.dtype))]

    def expected(self, dropout_p: float = 0.0) -> list[Tensor]:
        """The same in float64."""
        double = Case.__new__(Case)
        double.__dict__ = {
            name: value.detach().double().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in self.__dict__.items()
        }  # fmt: skip
        return double.run(apart, dropout_p)


def kernels_of(call) -> set[str]:
    with torch.profiler.profile() as profile:
        call()
    return {event.key for event in profile.key_averages()}


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("out", "x", "weight", "bias"), got, expected, strict=False):
        size = float(b.abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=0,
            atol=tolerance * max(size, 1.0),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@COMPILED
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [[3, 0, 5], [1], [0, 0], [], [1300]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_are_those_of_the_formula(dtype: torch.dtype, lengths: list[int], dropout_p: float) -> None:
    case = Case(lengths, dtype=dtype)
    got: list[Tensor] = []
    assert KERNEL in kernels_of(lambda: got.extend(case.run(dropout_p=dropout_p)))
    assert [x.dtype for x in got] == [dtype] * 4
    assert_close(got, case.expected(dropout_p), 2e-5 if dtype == torch.float32 else 4e-2)


@COMPILED
def test_the_same_bits_for_any_number_of_threads() -> None:
    tokens, threads = torch.randn(5, 1602, 2, 4), torch.get_num_threads()
    cu_seqlens, lse = torch.tensor([0, 300, 302, 1602], dtype=torch.int32), torch.randn(1602, 2)
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            given = (*tokens[:2], lse, *tokens[2:], cu_seqlens, 1300, 0.5, 0.2, torch.tensor([7]))
            results.append(operator_of("self_attention_backward")(*given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    case = Case([3, 2])
    case.leaves[frozen].requires_grad_(False)
    out = self_attention(*case.leaves, *case.rest())
    out.backward(case.grad)
    expected = case.expected()[1:]
    for place, leaf in enumerate(case.leaves):
        assert (leaf.grad is None) == (place == frozen)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), expected[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_second_derivatives(dropout_p: float, autocast: bool) -> None:
    case = Case([3, 2])
    second = []
    for function in (self_attention, apart):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(*case.leaves, *case.rest(dropout_p))
        first = torch.autograd.grad(out.float().sin().sum(), case.leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), case.leaves))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=(0.05 if autocast else 1e-4) * float(b.abs().max()))


@COMPILED
def test_under_autocast_the_leaves_keep_their_type() -> None:
    case, got = Case([3, 0, 5]), []
    with torch.autocast("cpu", torch.bfloat16):
        assert KERNEL in kernels_of(lambda: got.extend(case.run()))
    assert [x.dtype for x in got] == [torch.bfloat16, *[torch.float32] * 3]
    assert_close(got, case.expected(), 4e-2)


@COMPILED
@pytest.mark.parametrize("other", ["float64", "reference", "compiled", "per sample gradients", "no gradient"])
def test_what_the_kernel_does_not_serve_goes_by_the_public_operator(other: str) -> None:
    case = Case([3, 2], dtype=torch.float64 if other == "float64" else torch.float32)
    expected = case.expected()

    def run() -> None:
        if other == "reference":
            with mf.use_backend("reference"):
                assert_close(case.run(), expected, 1e-5)
        elif other == "compiled":
            torch.compiler.reset()
            assert_close(case.run(torch.compile(self_attention, fullgraph=True, backend="aot_eager")), expected, 1e-5)
        elif other == "per sample gradients":
            loss = lambda x: (self_attention(x, case.weight, case.bias, *case.rest()) * case.grad).sum()  # noqa: E731
            assert_close([torch.func.grad(loss)(case.x.detach())], expected[1:2], 1e-5)
        elif other == "no gradient":
            with torch.no_grad():
                assert_close([self_attention(*case.leaves, *case.rest())], expected[:1], 1e-5)
        else:
            assert_close(case.run(), expected, 1e-12)

    assert KERNEL not in kernels_of(run)


@COMPILED
def test_the_operator_refuses_what_does_not_belong_together() -> None:
    q, cu = torch.randn(5, 2, 4), torch.tensor([0, 3, 5], dtype=torch.int32)
    backward = operator_of("self_attention_backward")
    rest = (cu, 3, 0.5, 0.0, None)
    with pytest.raises(RuntimeError, match="v has the wrong shape"):
        backward(q, q, q[..., 0], q, q, q[:4], *rest)
    with pytest.raises(RuntimeError, match="k has the wrong shape"):
        backward(q, q, q[..., 0], q, q[:, :1], q[:, :1], *rest)
    with pytest.raises(RuntimeError, match="lse must be float32"):
        backward(q, q, q[:4, :, 0], q, q, q, *rest)
    with pytest.raises(RuntimeError, match="cu_seqlens_q must"):
        backward(q, q, q[..., 0], q, q, q, cu - 1, *rest[1:])


def test_the_kernel_is_left_alone_without_the_compiled_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._backends, "select", lambda *arguments, **options: "reference")
    case = Case([3, 2])
    assert KERNEL not in kernels_of(lambda: assert_close(case.run(), case.expected(), 1e-5))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_and_kept_gradients_are_those_of_the_formula(create_graph: bool) -> None:
    case, found = Case([3, 2]), []
    for function in (self_attention, apart):
        x = case.x * 1.0
        x.retain_grad()
        x.register_hook(lambda grad: 2 * grad)
        weight = case.weight * 1.0
        weight.register_hook(lambda grad: 3 * grad)
        out = function(x, weight, case.bias, *case.rest())
        leaves = [case.x, case.weight, case.bias]
        grads = torch.autograd.grad(out, leaves, case.grad, create_graph=create_graph, retain_graph=True)
        out.backward(case.grad, create_graph=create_graph)
        found.append([*grads, x.grad])
        for leaf in leaves:
            leaf.grad = None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_many_gradients_at_once() -> None:
    case = Case([3, 2])
    out = self_attention(*case.leaves, *case.rest())
    cotangents = torch.randn(4, *out.shape)
    at_once = torch.autograd.grad(out, case.leaves, cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        for a, b in zip(at_once, torch.autograd.grad(out, case.leaves, cotangent, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


@COMPILED
def test_the_operator_is_one_of_the_dispatcher() -> None:
    q, cu = torch.randn(5, 2, 4), torch.tensor([0, 3, 5], dtype=torch.int32)
    given = (q, q, q[..., 0].contiguous(), q + 1, q + 2, q + 3, cu, 3, 0.5, 0.2, torch.tensor([7]))
    torch.library.opcheck(operator_of("self_attention_backward"), given)
    with pytest.raises(RuntimeError, match="head width D >= 1"):
        operator_of("self_attention_backward")(
            *(x[..., :0] for x in given[:2]), given[2], *(x[..., :0] for x in given[3:6]), *given[6:]
        )

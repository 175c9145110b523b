"""Flush-to-zero where two threads of torch share the work: both of them flush, or one does.

`torch.set_flush_denormal` sets the register of the thread that calls it, and a thread of OpenMP starts with a copy of
its maker's. So both flush where the call comes before the first parallel work, and one where it comes after. Either
way the results are finite and within the tolerance of the float64 reference, which flushes nothing. A second call gives
the same: to the bit where both flush; where one does, but for what subnormal numbers add, since it is not fixed which
of the two takes which part of attention. Key weights that are subnormal for one thread and 0 for the other are summed
in other ways by the two, which are rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from public_calls import same_bits
from torch import Tensor

import mmer_fast as mf
from mmer_fast import ops
from mmer_fast.ops.dropout import relu_dropout
from mmer_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm

SMALLEST = torch.finfo(torch.float32).smallest_normal
TOLERANCE = 2e-5  # of float32, relative to the largest entry or 1
SUBNORMAL_SUMS = 1e-30  # more than any sum of subnormal numbers here
ROUNDING = 1e-6  # of sums whose order, or whose scale, is another

Function = Callable[..., Tensor]


class Case(NamedTuple):
    """Inputs, and what is computed of them by an operator and by its reference in float64."""

    inputs: list[Tensor]
    function: Function
    reference: Function


def laced(*shape: int) -> Tensor:
    """Normal numbers, every third of which is subnormal."""
    x = torch.randn(shape)
    x.view(-1)[::3] *= SMALLEST / 8
    return x


def soft_topk() -> Case:
    def call(scores: Tensor, backend: str | None = None) -> Tensor:
        return mf.soft_topk(scores, 7, epsilon=0.1, backend=backend)

    return Case([laced(500, 50)], call, lambda scores: call(scores, "reference"))


def masked_attention() -> Case:
    weights = torch.rand(2, 300)
    weights[:, ::3] *= SMALLEST / 8

    def call(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
        out = mf.masked_attention(q, k, v, weights, backend=backend)
        assert isinstance(out, Tensor)
        return out

    inputs = [laced(2, 4, 300, 16), laced(2, 2, 300, 16), laced(2, 2, 300, 16)]
    return Case(inputs, call, lambda *three: call(*three, "reference"))


def packed_attention() -> Case:
    ends = mf.packed_layout(torch.tensor([130, 1, 70, 99])).cu_seqlens

    def call(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
        out = mf.packed_attention(q, k, v, ends, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return Case([laced(300, 4, 16) for _ in range(3)], call, lambda *three: call(*three, "reference"))


def layer_norm() -> Case:
    def call(x: Tensor, x_bias: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dropout_add_layer_norm(x, x_bias, residual, weight, bias, 1e-5, 0.0)

    def reference(*inputs: Tensor) -> Tensor:
        x, x_bias, residual, weight, bias = (one.double() for one in inputs)
        return F.layer_norm(residual + x + x_bias, weight.shape, weight, bias, 1e-5)

    rows, row = (3000, 24), (24,)
    return Case([laced(*shape) for shape in (rows, row, rows, row, row)], call, reference)


def relu() -> Case:
    def reference(x: Tensor, bias: Tensor) -> Tensor:
        return F.relu(x.double() + bias.double())

    return Case([laced(3000, 24), laced(24)], lambda x, bias: relu_dropout(x, bias, 0.0), reference)


CASES = {case.__name__: case for case in (soft_topk, masked_attention, packed_attention, layer_norm, relu)}


def with_gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of half its square."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


def twice_on_two_threads(work: Callable[[], list[Tensor]], both: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What `work` gives the first and the second time on two threads, of which `both` flush or one does.

    It runs in a thread of Python's, which has threads of OpenMP of its own; they end with it.
    """
    tiny = torch.full((1 << 20,), SMALLEST / 8)

    def run() -> tuple[int, list[Tensor], list[Tensor]] | None:
        torch.set_num_threads(2)
        if not both:
            tiny.add(tiny)  # the other thread is there, with a register that flushes nothing
        if not torch.set_flush_denormal(True):
            return None
        flushed = tiny.add(tiny).view(torch.int32) == 0
        return int(flushed.sum()), work(), work()

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(run).result()
    finally:
        torch.set_num_threads(before)
    if result is None:
        pytest.skip("this processor cannot flush subnormal numbers to zero")
    flushed, first, second = result
    if flushed == 0 or (flushed == len(tiny)) != both:
        pytest.skip(f"this OpenMP hands the register on in another way: {flushed} of {len(tiny)} numbers are flushed")
    return first, second


EITHER = pytest.mark.parametrize("both", [True, False], ids=["both flush", "one flushes"])


@EITHER
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_reference_and_of_the_call_before(name: str, both: bool) -> None:
    inputs, function, reference = CASES[name]()
    expected = with_gradients(reference, inputs)
    first, second = twice_on_two_threads(lambda: with_gradients(function, inputs), both)
    for got, again, want in zip(first, second, expected, strict=True):
        assert got.isfinite().all()
        assert (got.double() - want.double()).abs().max() <= TOLERANCE * max(1.0, float(want.abs().max()))
        apart = ROUNDING * max(1.0, float(want.abs().max())) if name == "masked_attention" else SUBNORMAL_SUMS
        assert (got - again).abs().max() <= apart
    if both:
        assert same_bits(first, second)


@EITHER
def test_weights_move_as_the_reference_moves_them_and_come_back(both: bool) -> None:
    """Which thread has which chunk is fixed, so that all bits are the same each time; and those restored are copies."""
    weights, gradient = laced(200_000), laced(200_000)

    def cycle(backend: str | None = None) -> list[Tensor]:
        w, stash = weights.clone(), torch.empty_like(weights)
        norm, factor = ops.perturb_([w], [gradient], [stash], 50.0, backend=backend)
        moved = w.clone()
        ops.restore_([w], [stash], backend=backend)
        return [norm, factor, moved, w]

    expected = cycle("reference")
    first, second = twice_on_two_threads(cycle, both)
    assert same_bits(first, second)
    assert same_bits(first[3:], [weights])
    for got, want in zip(first, expected, strict=True):
        assert got.isfinite().all()
        assert (got.double() - want.double()).abs().max() <= TOLERANCE * max(1.0, float(want.abs().max()))

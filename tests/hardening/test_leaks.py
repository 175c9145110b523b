"""Memory in use stays what it was, however often an operator is called: heap, Python objects, graphs, failed calls.

What is counted are the bytes that malloc has given out and not got back, which to a few hundred bytes is exact, and the
objects of Python. The memory of the process (RSS) says the same much more coarsely, and is checked after 10⁶ calls.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from public_calls import CALLS
from torch import Tensor

import mmer_fast as mf
from mmer_fast import ops

ONE_ALLOCATION = 64  # bytes: of the numbers of a tensor, which are aligned to as many; its other parts are larger
OBJECTS_OF_A_CALL = 0.5  # that caches may still take: fewer than any leak has
ROUNDS, MOST_ROUNDS = 4, 40
Work = Callable[[], object]


_FIELDS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIELDS)


def _heap() -> int:
    """Bytes that malloc has given out."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc >= 2.33, whose mallinfo2 counts bytes")
    libc.mallinfo2.restype = _Mallinfo2
    state = libc.mallinfo2()
    return state.uordblks + state.hblkhd


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def assert_no_growth(work: Work, calls: int) -> None:
    """There are `calls` in a row that leave as much memory in use as there was before.

    They are as many rounds, of which none may have kept an allocation, and what was given back does not make up for
    another. A leak shows in all of them; the first ones fill caches. Those of torch's own `autograd.Function` fill ever
    more slowly: what 150 calls leave halves each time, from about 1000 objects on.
    """
    rounds: deque[tuple[int, int]] = deque(maxlen=ROUNDS)
    for _ in range(MOST_ROUNDS):
        gc.collect()
        heap, blocks = _heap(), sys.getallocatedblocks()
        for _ in range(calls // ROUNDS):
            work()
        gc.collect()
        rounds.append((_heap() - heap, sys.getallocatedblocks() - blocks))
        grown, objects = sum(max(one, 0) for one, _ in rounds), sum(one for _, one in rounds)
        if len(rounds) == ROUNDS and grown < ONE_ALLOCATION and objects < OBJECTS_OF_A_CALL * calls:
            return
    raise AssertionError(f"{calls} calls leave {grown} bytes and {objects} objects of Python: {list(rounds)}")


@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward(name: str) -> None:
    assert_no_growth(lambda: CALLS[name](3), 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward_very_often(name: str) -> None:
    assert_no_growth(lambda: CALLS[name](3), 5_000)


def _cheap() -> dict[str, Work]:
    scores, q = torch.randn(1, 6), torch.randn(1, 1, 2, 4)
    params, grads, stash = ([torch.randn(5)] for _ in range(3))

    def cycle() -> None:
        ops.perturb_(params, grads, stash, 0.5)
        ops.restore_(params, stash)

    return {
        "soft_topk": lambda: mf.soft_topk(scores, 2),
        "masked_attention": lambda: mf.masked_attention(q, q, q),
        "grad_reverse": lambda: mf.grad_reverse(scores),
        "perturb_ and restore_": cycle,
    }


@pytest.mark.parametrize("name", _cheap())
@pytest.mark.parametrize("calls", [4_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_cheap_calls(name: str, calls: int) -> None:
    work = _cheap()[name]
    for _ in range(1000):
        work()
    before = _resident()
    assert_no_growth(work, calls)
    assert _resident() - before <= 16 << 20


def test_calls_that_fail() -> None:
    """The error paths of Python and of the compiled operators give back what they had."""
    scores, q = torch.randn(2, 6), torch.randn(1, 1, 2, 4)
    forward = torch.ops.mmer_fast.soft_topk_forward

    def fail() -> None:
        with pytest.raises(ValueError):
            mf.soft_topk(scores, 7)
        with pytest.raises(ValueError):
            mf.masked_attention(q, q, q[..., :3])
        with pytest.raises(RuntimeError):
            forward(scores, torch.ones(3, dtype=torch.float64), 0.0, None, 1.0, None, None, True, 0)

    assert_no_growth(fail, 200)


def _graph_of_soft_topk(leaf: Tensor) -> Tensor:
    return mf.soft_topk(leaf, 2, epsilon=1.0)


def _graph_of_attention(leaf: Tensor) -> Tensor:
    x = leaf[None, None]
    out = mf.masked_attention(x, x, x)
    assert isinstance(out, Tensor)
    return out


def _second_graph_of_soft_topk(leaf: Tensor) -> Tensor:
    return torch.autograd.grad(_graph_of_soft_topk(leaf).square().sum(), leaf, create_graph=True)[0]


def _second_graph_of_attention(leaf: Tensor) -> Tensor:
    return torch.autograd.grad(_graph_of_attention(leaf).square().sum(), leaf, create_graph=True)[0]


@pytest.mark.parametrize(
    "graph", [_graph_of_soft_topk, _graph_of_attention, _second_graph_of_soft_topk, _second_graph_of_attention]
)
@pytest.mark.parametrize("backward", [False, True])
def test_graphs_are_freed_without_the_cycle_collector(graph: Callable[[Tensor], Tensor], backward: bool) -> None:
    leaf = torch.randn(4, 6, requires_grad=True)
    out = graph(leaf)
    if backward:
        out.sum().backward()
    freed = [weakref.ref(leaf), weakref.ref(out)]
    gc.disable()
    try:
        del leaf, out
        assert [reference() for reference in freed] == [None, None]
    finally:
        gc.enable()


def test_parameters_that_were_perturbed_are_freed() -> None:
    """The stash of a parameter goes with it."""

    def work() -> None:
        module = torch.nn.Linear(40, 40)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        with mf.perturbed(module, 0.1):
            pass

    assert_no_growth(work, 100)

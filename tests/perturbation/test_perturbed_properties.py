"""Any parameters, tied, frozen, empty, without gradient, of any layout: the step is right and every bit returns."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import mmer_fast as mf

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Entry:
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    state: str


entries = st.builds(
    Entry,
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.sampled_from(["contiguous", "transposed", "holes", "offset"]),
    st.sampled_from(["plain", "plain", "tied", "frozen", "no gradient"]),
)


def parameter(entry: Entry) -> nn.Parameter:
    """Of this layout, with a gradient where its state has one."""
    shape, dtype = entry.shape, entry.dtype
    if entry.layout == "transposed":
        data = torch.randn(tuple(reversed(shape))).to(dtype).permute(tuple(reversed(range(len(shape)))))
    elif entry.layout == "holes" and shape:
        data = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    elif entry.layout == "offset" and shape:
        data = torch.randn(shape[0] + 1, *shape[1:]).to(dtype)[1:]
    else:
        data = torch.randn(shape).to(dtype)
    result = nn.Parameter(data, requires_grad=entry.state != "frozen")
    if entry.state in ("plain", "tied"):
        result.grad = torch.randn(shape).to(result.dtype)
    return result


def bits(p: Tensor) -> Tensor:
    return p.detach().clone(memory_format=torch.contiguous_format).view(BITS[p.element_size()])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    drawn=st.lists(entries, min_size=1, max_size=6),
    scope=st.sampled_from(["global", "tensor", "awp"]),
    radius=st.floats(0.0, 10.0),
    seed=st.integers(0, 2**31),
)
def test_any_parameters(drawn: list[Entry], scope: str, radius: float, seed: int) -> None:
    torch.manual_seed(seed)
    parameters = [parameter(entry) for entry in drawn]
    given_twice = parameters + [p for p, entry in zip(parameters, drawn, strict=True) if entry.state == "tied"]
    moving = [p for p in parameters if p.requires_grad and p.grad is not None]
    before, pointers = [bits(p) for p in parameters], [p.data_ptr() for p in parameters]
    old = {id(p): p.detach().double().clone() for p in parameters}
    if not moving:
        with pytest.raises(ValueError, match="has a gradient"):
            mf.perturb_(given_twice, radius, scope=scope)
        return

    for _ in range(2):
        with mf.perturbed(given_twice, radius, scope=scope) as info:
            assert len(info.names) == len(moving)
            steps = [p.detach().double() - old[id(p)] for p in moving]
            for i, (p, step) in enumerate(zip(moving, steps, strict=True)):
                assert p.grad is not None
                group = info.factor if scope == "global" else info.factor[i]
                expected = group.item() * p.grad.double()
                rounding = 2 * torch.finfo(p.dtype).eps * (old[id(p)].abs() + expected.abs()) + 1e-7
                assert bool(((step - expected).abs() <= rounding).all())
            still = [p for p in parameters if all(p is not m for m in moving)]
            assert all(torch.equal(p.detach().double(), old[id(p)]) for p in still)
        assert all(torch.equal(bits(p), b) for p, b in zip(parameters, before, strict=True))
        assert pointers == [p.data_ptr() for p in parameters]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_blocks_keep_every_bit(dtype: torch.dtype) -> None:
    layer = nn.Linear(7, 5).to(dtype)
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    before, pointers = [bits(p) for p in layer.parameters()], [p.data_ptr() for p in layer.parameters()]
    for i in range(1000):
        with mf.perturbed(layer, 0.01 + i % 5):
            assert not torch.equal(bits(layer.weight), before[0])
    assert all(torch.equal(bits(p), b) for p, b in zip(layer.parameters(), before, strict=True))
    assert pointers == [p.data_ptr() for p in layer.parameters()]

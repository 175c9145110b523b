"""What arguments are drawn from: tensors of every kind and layout, and what is no argument at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from public_calls import same_bits
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
SIZES = st.sampled_from((1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 0))  # of several, one seldom leaves nothing to compute
Arguments = dict[str, Any]
Call = tuple[Callable[..., Any], Arguments]


@st.composite
def laid_out(draw: Any, x: Tensor) -> Tensor:
    """The same numbers in memory of another layout."""
    kind = draw(st.sampled_from(["as it is", "transposed", "sliced", "behind an offset", "expanded"]))
    if kind == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced" and x.dim() >= 1:
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if kind == "behind an offset":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if kind == "expanded" and x.dim() >= 1 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, low: int = -1, high: int = 5) -> Tensor:
    """Numbers of a drawn seed: normal ones, now and then with a special one; integers in [low, high]."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if dtype == torch.bool:
        return draw(laid_out(torch.rand(shape, generator=generator) < 0.7))
    if not dtype.is_floating_point and not dtype.is_complex:
        return draw(laid_out(torch.randint(low, max(low, high) + 1, shape, generator=generator).to(dtype)))
    x = torch.randn(shape, generator=generator)
    special = draw(st.sampled_from([None] * 18 + [0.0, math.nan, math.inf, -math.inf, 1e-42, 3e38]))
    if special is not None and x.numel() > 0:
        x.view(-1)[:: max(1, x.numel() // 2)] = special
    return draw(laid_out(x.to(dtype)))


any_shape = st.lists(SIZES, max_size=4).map(tuple)
any_tensor = st.tuples(any_shape, st.sampled_from(FLOATS + OTHERS)).flatmap(lambda pair: tensors(*pair))
elsewhere = any_tensor.map(lambda x: x.to("meta"))
NUMBERS = (-1, 0, 1, 3, 10**30, -0.5, 0.5, 1e-42, math.nan, math.inf, True)
junk = st.one_of(
    any_tensor,
    elsewhere,
    st.sampled_from(NUMBERS),
    st.sampled_from([None, "x", b"", (), object, "cpu", "reference", "cuda", "newton"]),
    st.lists(any_tensor, max_size=2),
)


@st.composite
def disturbed(draw: Any, arguments: Arguments) -> Arguments:
    """In half of all cases one argument is something else."""
    if draw(st.booleans()):
        arguments[draw(st.sampled_from(sorted(arguments)))] = draw(junk)
    return arguments


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


BACKENDS = st.sampled_from([None, None, "cpu", "reference"])


def flat(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument or a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from flat(item)


@contextmanager
def bits_kept(weights: Sequence[Tensor]) -> Iterator[None]:
    """What happens inside, an error too, leaves the weights with the bits that they had."""
    before = [w.detach().clone() for w in weights]
    try:
        yield
    finally:
        if not all(w.is_meta or same_bits([w], [old]) for w, old in zip(weights, before, strict=True)):
            raise AssertionError("a weight has other bits afterwards")

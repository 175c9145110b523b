"""The perturbation operators where nothing may move, or not a bit may be lost."""

from __future__ import annotations

import contextlib
import math
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from perturbation_cases import DTYPES, SCALINGS, Lists, check, drawn, lists, same_bits, strided

from mmer_fast import ops
from mmer_fast.ops.perturbation_checks import check_distinct

POISON = [math.nan, math.inf, -math.inf]
NOTHING_TO_SAY = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def unmoved(case: Lists) -> list[bool]:
    return [same_bits(w, b) for w, b in zip(case.params, case.before, strict=True)]


def odd_bits(dtype: torch.dtype) -> torch.Tensor:
    """Numbers whose bits arithmetic would not keep: -0, quiet and signalling NaN with a payload, subnormals."""
    width = {torch.float64: 64, torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}[dtype]
    mantissa = {torch.float64: 52, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]
    ones = (1 << (width - 1 - mantissa)) - 1
    patterns = [1 << (width - 1), ones << mantissa | 5, ones << mantissa | 1 << (mantissa - 1) | 9, 1, 0, 3]
    patterns += [(1 << (width - 1)) | pattern for pattern in patterns[1:]]
    kind = {64: torch.int64, 32: torch.int32, 16: torch.int16}[width]
    signed = [p - (1 << width) if p >= 1 << (width - 1) else p for p in patterns]
    return torch.tensor(signed, dtype=kind).view(dtype)


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize(("scope", "adaptive"), SCALINGS)
def test_a_norm_that_is_not_finite_moves_nothing(
    backend: str, device: str, scope: str, adaptive: bool, poison: float
) -> None:
    case = drawn(device, shapes=[(50,), (3, 4)])
    case.grads[0][17] = poison
    norms, factors = ops.perturb_(
        case.params, case.grads, case.stash, 1.0, scope=scope, adaptive=adaptive, backend=backend
    )
    assert case.stashed()
    if scope == "global":
        assert unmoved(case) == [True, True]
        assert (bool(norms.isfinite()), factors.item()) == (False, 0.0)
    else:
        assert unmoved(case) == [True, False]
        assert norms.isfinite().tolist() == [False, True]
        assert factors[0].item() == 0.0
        assert factors[1].item() > 0
    ops.restore_(case.params, case.stash, backend=backend)
    assert case.restored()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", [0.0, math.nan])
def test_weights_that_do_not_move_keep_every_bit(
    backend: str, device: str, dtype: torch.dtype, gradient: float
) -> None:
    odd = odd_bits(dtype).to(device)
    case = lists([odd.clone()], [torch.full_like(odd, gradient)])
    ops.perturb_(case.params, case.grads, case.stash, 1.0, backend=backend)
    assert unmoved(case) == [True]
    assert case.stashed()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_bits_come_back(backend: str, device: str, dtype: torch.dtype) -> None:
    odd = odd_bits(dtype).to(device).repeat(7)
    for case in (lists([odd.clone()], [torch.randn(len(odd)).to(odd)]), lists([odd[1:]], [torch.ones_like(odd[1:])])):
        ops.perturb_(case.params, case.grads, case.stash, 1.0, backend=backend)
        assert case.stashed()
        ops.restore_(case.params, case.stash, backend=backend)
        assert case.restored()


@pytest.mark.parametrize("scope", ["global", "tensor", "awp"])
def test_zero_gradients_and_zero_radius_move_nothing(backend: str, device: str, scope: str) -> None:
    case = drawn(device, shapes=[(50,), (3, 4)])
    zeros = [torch.zeros_like(g) for g in case.grads]
    norms, factors = ops.perturb_(case.params, zeros, case.stash, 1.0, scope=scope, backend=backend)
    assert unmoved(case) == [True, True]
    assert not norms.any()
    assert not factors.any()
    norms, factors = ops.perturb_(case.params, case.grads, case.stash, 0.0, scope=scope, backend=backend)
    assert unmoved(case) == [True, True]
    assert (norms > 0).all()
    assert not factors.any()


def test_awp_leaves_weights_of_norm_zero_alone(backend: str, device: str) -> None:
    case = drawn(device, shapes=[(5,), (6,)])
    case.params[0].zero_()
    case.before[0].zero_()
    factors = ops.perturb_(case.params, case.grads, case.stash, 1.0, scope="awp", backend=backend)[1]
    assert unmoved(case) == [True, False]
    assert factors[0].item() == 0.0


def test_empty_tensors_only(backend: str, device: str) -> None:
    case = drawn(device, shapes=[(0,), (3, 0)])
    norm, factor = ops.perturb_(case.params, case.grads, case.stash, 1.0, backend=backend)
    assert (norm.item(), factor.item()) == (0.0, 0.0)
    norms, _ = ops.perturb_(case.params, case.grads, case.stash, 1.0, scope="awp", backend=backend)
    assert norms.tolist() == [0.0, 0.0]
    ops.restore_(case.params, case.stash, backend=backend)


def test_an_empty_view_inside_of_another_tensor_shares_nothing(backend: str, device: str) -> None:
    whole = torch.randn(6, device=device)
    params = [whole, whole[3:3], whole[3:3].reshape(2, 0)]
    check(backend, lists(params, [torch.ones_like(x) for x in params]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_cycles_keep_every_bit(backend: str, device: str, interpreted: bool, dtype: torch.dtype) -> None:
    """Adding and subtracting changes two weights of three in float32 over as many cycles."""
    case = drawn(device, dtype, shapes=[(37,), (5, 7)])
    pointers = [w.data_ptr() for w in case.params]
    for i in range(20 if interpreted else 1000):
        ops.perturb_(case.params, case.grads, case.stash, 0.1 + i % 7, backend=backend)
        assert not all(unmoved(case))
        ops.restore_(case.params, case.stash, backend=backend)
    assert case.restored()
    assert pointers == [w.data_ptr() for w in case.params]


def test_the_same_inputs_give_the_same_bits_whatever_the_threads(backend: str, device: str, interpreted: bool) -> None:
    shapes = [(3,), (9_000 if interpreted else 250_000,), (77, 5)]
    case = drawn(device, shapes=shapes)
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 1, 2):
            torch.set_num_threads(count)
            norms, factors = ops.perturb_(case.params, case.grads, case.stash, 0.5, backend=backend)
            seen.append([norms.clone(), factors.clone(), *(w.clone() for w in case.params)])
            ops.restore_(case.params, case.stash, backend=backend)
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_views_of_a_parameter_leave_the_rest_of_it_alone(backend: str, device: str) -> None:
    case = strided(device)
    wide = case.params[0]._base
    assert wide is not None
    holes = wide[:, 1::2].clone()
    ops.perturb_(case.params, case.grads, case.stash, 3.0, backend=backend)
    assert torch.equal(wide[:, 1::2], holes)
    ops.restore_(case.params, case.stash, backend=backend)
    assert torch.equal(wide[:, 1::2], holes)
    assert case.restored()


def slices(device: str, kind: str) -> list[torch.Tensor]:
    """Tensors of which none has an entry of another, though their addresses lie between each other."""
    matrix = torch.randn(6, 12, device=device)
    return {
        "columns": list(matrix.chunk(3, dim=1)),
        "transposed": [columns.t() for columns in matrix.chunk(4, dim=1)],
        "every_third": [matrix.flatten()[i::3] for i in range(3)],
        "blocks": [matrix[:3, :5], matrix[:3, 5:], matrix[3:, 1:7], matrix[3:, 7:]],
        "dtypes": [matrix[:, :4], matrix.view(torch.float16)[:, 8:11], matrix.view(torch.float64)[:, 3:]],
    }[kind]


@pytest.mark.parametrize("kind", ["columns", "transposed", "every_third", "blocks", "dtypes"])
def test_slices_that_lie_between_each_other(backend: str, device: str, kind: str) -> None:
    params = slices(device, kind)
    check(backend, lists(params, [torch.randn(w.shape, device=device) for w in params]))


def refusal(kind: type[Exception], shared: bool) -> contextlib.AbstractContextManager[object]:
    return pytest.raises(kind, match=r"params\[\d\] and params\[\d\] share") if shared else contextlib.nullcontext()


@pytest.mark.parametrize("seed", range(20))
def test_tensors_share_memory_where_a_byte_is_of_both(seed: int) -> None:
    draw = random.Random(seed)
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key("mmer_fast::restore_", "CPU")
    storage = torch.zeros(20, dtype=torch.float64).untyped_storage()

    def view() -> tuple[torch.Tensor, set[int]]:
        dtype = draw.choice(DTYPES)
        entries = torch.arange(storage.nbytes() // dtype.itemsize)
        shape = [draw.randint(1, 3) for _ in range(draw.randint(0, 3))]
        stride = [draw.randint(1, 7) for _ in shape]
        room = len(entries) - sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        place = draw.randrange(room) if room > 0 else 0
        shape, stride = (shape, stride) if room > 0 else ([], [])
        own = entries.as_strided(shape, stride, place).flatten().tolist()
        tensor = torch.empty(0, dtype=dtype).set_(storage, place, shape, stride)
        return tensor, {entry * dtype.itemsize + byte for entry in own for byte in range(dtype.itemsize)}

    found = set()
    for _ in range(100):
        (a, bytes_of_a), (b, bytes_of_b) = view(), view()
        shared = not bytes_of_a.isdisjoint(bytes_of_b)
        found.add(shared)
        with refusal(ValueError, shared):
            check_distinct({"params": [a, b]})
        if compiled:
            with refusal(RuntimeError, shared):
                torch.ops.mmer_fast.restore_([a, b], [torch.zeros(x.shape, dtype=x.dtype) for x in (a, b)])
    assert found == {True, False}


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[torch.dtype], list[torch.dtype], int, list[bool]]:
    shapes = draw(st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=5))
    kinds = st.lists(st.sampled_from(DTYPES), min_size=len(shapes), max_size=len(shapes))
    flips = st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes))
    return shapes, draw(kinds), draw(kinds), draw(st.integers(0, 2**31)), draw(flips)


@settings(max_examples=60, deadline=None, suppress_health_check=NOTHING_TO_SAY, derandomize=True)
@given(problem=problems(), scaling=st.sampled_from(SCALINGS), radius=st.floats(0, 10))
def test_any_lists(backend: str, device: str, problem, scaling: tuple[str, bool], radius: float) -> None:
    """Shapes, strides and dtypes as they come: the step of the reference, and every bit back."""
    shapes, weight_dtypes, grad_dtypes, seed, flips = problem
    torch.manual_seed(seed)
    params, grads = [], []
    for shape, dtype, grad_dtype, flip in zip(shapes, weight_dtypes, grad_dtypes, flips, strict=True):
        w = torch.randn(tuple(reversed(shape)) if flip else shape).to(device, dtype)
        params.append(w.permute(tuple(reversed(range(w.dim())))) if flip else w)
        grads.append(torch.randn(shape).to(device, grad_dtype))
    check(backend, lists(params, grads), radius=radius, scope=scaling[0], adaptive=scaling[1])

"""The CUDA perturbation kernels without a GPU: their sources run on the host, thread by thread (cuda_emulation).

Every array ends at a page without access, results and shared memory are NaN at first, an unaligned vector ends the
launch, and each kernel runs twice with its warps in another order and its chunks shared by other numbers of blocks: the
results must be the same bits, and the float64 reference's to within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import launch
from cuda_emulation.perturbation_launch import AWP, GLOBAL, TENSOR, Machine, Perturbed
from torch import Tensor

from mmer_fast.ops import perturbation_reference as reference

NAN, INF = math.nan, math.inf
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]
PAIRS = list(product(DTYPES, DTYPES))
WAYS = [(GLOBAL, False), (TENSOR, False), (AWP, False), (GLOBAL, True), (TENSOR, True)]  # scope, adaptive
SIZES = [0, 1, 7, 129, 1134, 8192 + 5, 2 * 8192]  # a chunk has 8192 entries
NORM_TOLERANCE = 1e-6

pytestmark = pytest.mark.skipif(launch.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Path:
    return launch.build(pytestconfig.cache.mkdir("cuda_emulation"), "perturbation")


@pytest.fixture
def machine(library: Path) -> Machine:
    return Machine(library)


def same(first: Tensor, second: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def randn(sizes: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    return [(scale * torch.randn(n, dtype=F64)).to(dtype) for n in sizes]


def run(machine: Machine, weights: list[Tensor], grads: list[Tensor], *args: Any, **options: Any) -> Perturbed:
    """Twice, with the same bits; the stash has the old ones and restores them."""
    runs = []
    for seed, multiprocessors in ((1, 1), (2, 5)):
        machine.order(seed, multiprocessors)
        runs.append(machine.perturb(weights, grads, *args, **options))
    first, second = runs
    for name in ("norms", "weight_norms", "factors"):
        assert same(getattr(first, name), getattr(second, name)), name
    for i, w in enumerate(weights):
        assert same(first.weights[i], second.weights[i]), i
        assert same(first.stash[i], w), i
        assert same(second.stash[i], w), i
    machine.restore(second)
    assert all(same(got, w) for got, w in zip(second.weights, weights, strict=True))
    return first


def near_norms(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got.isfinite(), expected.isfinite()), (got, expected)
    got, expected = (x.nan_to_num(0.0, 0.0, 0.0) for x in (got, expected))
    assert ((got - expected).abs() <= NORM_TOLERANCE * expected).all(), (got, expected)


def check(
    machine: Machine,
    weights: list[Tensor],
    grads: list[Tensor],
    radius: float = 0.05,
    scope: int = GLOBAL,
    adaptive: bool = False,
    **options: Any,
) -> Perturbed:
    """The kernels beside the reference on float64 copies of the weights."""
    wide = [w.double() for w in weights]
    steps = [w.clone() for w in wide]
    given = options.get("norms"), options.get("weight_norms")
    kept = [w.clone() for w in wide]
    norms, factors = reference.perturb_(steps, grads, kept, *given, radius, scope, adaptive)

    got = run(machine, weights, grads, radius, scope, adaptive, **options)
    near_norms(got.norms, norms)
    near_norms(got.factors, factors)
    if scope == AWP and given[1] is None:
        near_norms(got.weight_norms, torch.stack([reference.norm(w) for w in weights]))
    for i, (w, g, expected) in enumerate(zip(weights, grads, steps, strict=True)):
        if factors[0 if scope == GLOBAL else i] == 0:
            assert same(got.weights[i], w), i
            continue
        precision = 2.0**-52 if F64 in (w.dtype, g.dtype) else 2.0**-23
        type_ = torch.finfo(w.dtype)
        # The norm to 5e-7, the step in the type that computes, then to the nearest number of the weights' type.
        allowed = (5e-7 + 4 * precision) * (expected - wide[i]).abs() + precision * expected.abs()
        allowed += 0.501 * torch.clamp(type_.eps * expected.abs(), min=type_.eps * type_.tiny)
        error = (got.weights[i].double() - expected).abs()
        assert (error <= allowed).all(), (i, float((error / allowed).max()))
    return got


@pytest.mark.parametrize(("scope", "adaptive"), WAYS)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_dtypes(machine: Machine, pair: tuple[torch.dtype, torch.dtype], scope: int, adaptive: bool) -> None:
    check(machine, randn(SIZES, pair[0]), randn(SIZES, pair[1], 0.3), 0.5, scope, adaptive)


@pytest.mark.parametrize(("scope", "adaptive"), WAYS)
def test_mixed_dtypes(machine: Machine, scope: int, adaptive: bool) -> None:
    weights = [torch.randn(200 + i, dtype=F64).to(w) for i, (w, _) in enumerate(PAIRS)]
    grads = [torch.randn(200 + i, dtype=F64).to(g) for i, (_, g) in enumerate(PAIRS)]
    check(machine, weights, grads, 0.5, scope, adaptive)


@pytest.mark.parametrize("slack", [s for s in product((0, 1), repeat=3) if any(s)], ids=str)
@pytest.mark.parametrize("pair", [(F32, F32), (F64, F64), (BF16, BF16), (F32, F16), (F16, F32)], ids=str)
def test_unaligned(machine: Machine, pair: tuple[torch.dtype, torch.dtype], slack: tuple[int, int, int]) -> None:
    """Weights, gradients or stash off a multiple of 16 bytes: the same bits as when all are aligned, but for sums."""
    weights, grads = randn([8192 + 4096], pair[0]), randn([8192 + 4096], pair[1])
    norms = torch.tensor([2.0], dtype=F64)
    aligned = run(machine, weights, grads, 0.5, TENSOR, norms=norms)
    assert same(aligned.weights[0], run(machine, weights, grads, 0.5, TENSOR, norms=norms, slack=slack).weights[0])
    check(machine, weights, grads, 0.5, GLOBAL, True, slack=slack)


def test_many_entries(machine: Machine) -> None:
    """So many that a chunk is longer than the shortest."""
    sizes = [3, 2048 * 8192 + 12345]
    assert machine.workspace(sizes, TENSOR) == 8 * (1 + 1025)
    weights = [torch.ones(sizes[0]), torch.arange(sizes[1], dtype=torch.int32).to(torch.int16).view(BF16)]
    grads = [torch.ones(sizes[0]), torch.ones(sizes[1], dtype=BF16)]
    got = machine.perturb(weights, grads, 4096.0, TENSOR)
    near_norms(got.norms, torch.tensor(sizes, dtype=F64).sqrt())
    assert same(got.stash[1], weights[1])
    step = torch.tensor(float(got.factors[1]))
    finite = weights[1].isfinite()
    assert same(got.weights[1][finite], (weights[1].float() + step).to(BF16)[finite])
    machine.restore(got)
    assert same(got.weights[1], weights[1])


COUNTS = [(count, GLOBAL, False) for count in (120, 121, 1000, 1001)] + [(1100, TENSOR, True), (130, AWP, False)]


@pytest.mark.parametrize(("count", "scope", "adaptive"), COUNTS)
def test_many_tensors(machine: Machine, count: int, scope: int, adaptive: bool) -> None:
    """One launch for the norms and one for the step, one to restore, up to so many tensors."""
    sizes = [(7 * i) % 23 for i in range(count)]
    weights, grads = randn(sizes, F32), randn(sizes, BF16)
    assert machine.tensors == 1000
    tables = 1 if count <= 1000 else 2
    before = machine.launches
    check(machine, weights, grads, 0.05, scope, adaptive)
    assert machine.launches - before == 2 * 2 * tables + tables  # two steps, once restored
    before = machine.launches
    machine.norm(grads, scope, weights, adaptive)
    assert machine.launches - before == tables + (1 if scope == GLOBAL else tables)


def test_launches(machine: Machine) -> None:
    weights, grads = randn(SIZES, F32), randn(SIZES, F32)
    before = machine.launches
    machine.perturb(weights, grads, 0.05, GLOBAL, norms=torch.ones(1, dtype=F64))
    assert machine.launches - before == 1


@pytest.mark.parametrize(("scope", "adaptive"), WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_alone(machine: Machine, dtype: torch.dtype, scope: int, adaptive: bool) -> None:
    weights, grads = randn(SIZES, F32), randn(SIZES, dtype)
    needed = weights if adaptive or scope == AWP else None
    norms, weight_norms = machine.norm(grads, scope, needed, adaptive)
    expected, expected_weight_norms = reference.grad_norm(grads, weights, scope, adaptive)
    near_norms(norms, expected)
    near_norms(weight_norms, expected_weight_norms)
    got = machine.perturb(weights, grads, 0.05, scope, adaptive)
    assert same(got.norms, norms)
    assert same(got.weight_norms, weight_norms)


@pytest.mark.parametrize("scope", [GLOBAL, TENSOR, AWP])
@pytest.mark.parametrize("adaptive", [False, True])
def test_given_norms(machine: Machine, scope: int, adaptive: bool) -> None:
    weights, grads = randn(SIZES, F32), randn(SIZES, F16)
    groups = 1 if scope == GLOBAL else len(SIZES)
    norms = torch.rand(groups, dtype=F64) + 0.5
    weight_norms = torch.rand(groups, dtype=F64) + 0.5 if scope == AWP else None
    got = check(machine, weights, grads, 0.05, scope, adaptive, norms=norms, weight_norms=weight_norms)
    assert same(got.norms, norms)
    if weight_norms is not None:
        assert same(got.weight_norms, weight_norms)


def test_norms_of_weights_are_needed_too(machine: Machine) -> None:
    with pytest.raises(AssertionError, match="error 1"):
        machine.perturb(randn([3], F32), randn([3], F32), 0.05, AWP, norms=torch.ones(1, dtype=F64))


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 0.0])
def test_given_norms_without_a_step(machine: Machine, bad: float) -> None:
    weights, grads = randn([5, 9000], BF16), randn([5, 9000], BF16)
    got = check(machine, weights, grads, 0.05, TENSOR, norms=torch.tensor([bad, 2.0], dtype=F64))
    assert got.factors.tolist() == [0.0, 0.025]


# ---- Magnitudes ------------------------------------------------------------------------------------------------------

SCALES = {
    F32: [1e-44, 1e-40, 1e-38, 1e-30, 1e-19, 1e19, 1e30, 2e37],
    F64: [1e-310, 1e-300, 1e-200, 1e-100, 1e200, 1e305],
    BF16: [1e-40, 1e-38, 1e-30, 1e30, 2e37],
    F16: [1e-7, 1e-5, 8000.0],
}
SCALED = [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]


@pytest.mark.parametrize(("dtype", "scale"), SCALED, ids=str)
@pytest.mark.parametrize(("scope", "adaptive"), [(GLOBAL, False), (AWP, False), (TENSOR, True)])
def test_gradients_of_any_size(machine: Machine, dtype: torch.dtype, scale: float, scope: int, adaptive: bool) -> None:
    sizes = [1, 300, 9000]
    grads = [g.clamp(-4 * scale, 4 * scale) for g in randn(sizes, dtype, scale)]
    got = check(machine, randn(sizes, F32), grads, 0.5, scope, adaptive)
    assert (got.norms > 0).all()
    assert (got.factors > 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize(("w", "g"), [(1e-30, 1e30), (1e30, 1e-30), (1e-30, 1e-30), (1e25, 1e25), (1e-41, 1e20)])
def test_adaptive_products_of_any_size(machine: Machine, dtype: torch.dtype, w: float, g: float) -> None:
    sizes = [1, 300, 9000]
    weights = randn(sizes, dtype, w)
    if w > 1:  # Half of the entries the other way round: products that lose digits in float
        weights[2][::2] *= 1e-50 if dtype == F64 else 1e-30
    grads = randn(sizes, dtype, g)
    grads[2][::2] = (grads[2][::2].double() * 1e-10).to(dtype)
    check(machine, weights, grads, 1e-3, GLOBAL, True)


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32), (F16, BF16), (F64, F64), (F32, F64)], ids=str)
def test_adaptive_products_of_opposite_sizes(machine: Machine, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Large weights have small gradients, in the same vector: neither the largest weight nor gradient says how large
    their products are."""
    large = torch.tensor([1e30, 1e-30] if pair[0] != F16 else [6e4, 6e-8], dtype=F64).repeat(3000)
    weights = [(large * (1 + torch.rand(6000, dtype=F64) / 16)).to(pair[0])]
    grads = [(1e-3 / large * (1 + torch.rand(6000, dtype=F64))).to(pair[1])]
    check(machine, weights, grads, 1e-3, TENSOR, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaptive_weights_of_zero_stay(machine: Machine, dtype: torch.dtype) -> None:
    """Even where their gradients are beyond all range of the norm."""
    tiny, large = (1e-7, 6e4) if dtype == F16 else (1e-30, 1e30)
    weights, grads = [torch.zeros(5000, dtype=dtype)], [torch.full((5000,), large, dtype=dtype)]
    weights[0][77], grads[0][77] = tiny, tiny
    got = check(machine, weights, grads, 1e-3, GLOBAL, True)
    assert got.factors > 0
    got.weights[0][77] = 0.0
    assert not got.weights[0].any()


def test_half_gradients_of_norm_128000(machine: Machine) -> None:
    grads = [torch.full((16384,), 1000.0, dtype=F16)]
    got = check(machine, randn([16384], F16), grads, 1.0)
    assert abs(float(got.norms) - 128000.0) < 1e-2


def test_norms_of_any_size_in_one(machine: Machine) -> None:
    """One group of tensors whose norms, squared, no double can hold together."""
    grads = [torch.tensor([3e-200], dtype=F64), torch.tensor([1e200, -1e200], dtype=F64), torch.ones(3)]
    weights = [torch.ones(g.numel(), dtype=F64) for g in grads]
    assert abs(float(check(machine, weights, grads).norms) / (math.sqrt(2) * 1e200) - 1) < NORM_TOLERANCE
    got = check(machine, weights, grads, scope=TENSOR)
    assert abs(float(got.norms[0]) / 3e-200 - 1) < NORM_TOLERANCE


@pytest.mark.parametrize("n", [4096, 200])  # by vectors and by entries
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_of_the_norm(machine: Machine, dtype: torch.dtype, n: int) -> None:
    """Well below the tolerance."""
    grads = [g.abs() for g in randn([n] * 8, dtype)]
    norms, _ = machine.norm(grads, TENSOR)
    expected, _ = reference.grad_norm(grads, grads, TENSOR, False)
    assert ((norms / expected - 1).abs() < (1e-14 if dtype == F64 else 2e-7)).all()


@pytest.mark.parametrize("radius", [0.0, 1e-45, 1e30])
def test_radii(machine: Machine, radius: float) -> None:
    weights, grads = randn([9, 5000], F32), randn([9, 5000], F32)
    got = check(machine, weights, grads, radius, TENSOR)
    assert (got.factors > 0).all() == (radius > 0)


# ---- Bits ------------------------------------------------------------------------------------------------------------


def odd_bits(n: int, dtype: torch.dtype) -> Tensor:
    """Any bits at all: NaN with payloads, infinities, -0.0, subnormal numbers."""
    bits = torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    bits[: n // 4] = -0.0
    return bits


@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_kept(machine: Machine, dtype: torch.dtype, slack: int) -> None:
    """`run` compares stash and restored weights."""
    sizes = [1, 7, 129, 1134, 8192, 16389]
    weights, grads = [odd_bits(n, dtype) for n in sizes], randn(sizes, dtype)
    options = {"slack": (slack, 0, slack)}
    moved = run(machine, weights, grads, 0.5, TENSOR, **options)
    assert not same(moved.weights[5], weights[5])
    still = run(machine, weights, grads, 0.0, TENSOR, **options)
    assert all(same(got, w) for got, w in zip(still.weights, weights, strict=True))


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scope", "adaptive"), WAYS)
def test_no_step(machine: Machine, dtype: torch.dtype, scope: int, adaptive: bool, bad: float) -> None:
    """One entry that is not finite, or none but zeros: the group's weights keep their bits, the others move."""
    sizes = [129, 16389, 8192, 0]
    weights, grads = randn(sizes, dtype), randn(sizes, dtype)
    weights[1][:300] = -0.0
    if bad == 0.0:
        grads = [torch.zeros_like(g) if scope == GLOBAL or i == 1 else g for i, g in enumerate(grads)]
    else:
        grads[1][16385] = bad
    got = check(machine, weights, grads, 0.5, scope, adaptive)
    assert same(got.weights[1], weights[1])
    assert same(got.weights[0], weights[0]) == (scope == GLOBAL)
    if bad != 0.0:
        assert not got.norms[0 if scope == GLOBAL else 1].isfinite()
    if scope != GLOBAL:
        assert got.norms[3] == 0
        assert got.factors[3] == 0


@pytest.mark.parametrize("bad", [NAN, INF])
def test_weights_that_are_not_finite(machine: Machine, bad: float) -> None:
    weights, grads = randn([129, 8200], F32), randn([129, 8200], F32)
    weights[1][8199] = bad
    got = run(machine, weights, grads, 0.5, AWP)
    assert not got.weight_norms[1].isfinite()
    assert same(got.weights[1], weights[1])
    assert got.factors[0] > 0
    assert got.factors[1] == 0
    got = run(machine, weights, grads, 0.5, TENSOR)
    assert got.factors[1] > 0
    assert same(got.weights[1][8199:].isfinite(), torch.tensor([False]))
    assert got.weights[1][:8199].isfinite().all()


def test_no_tensor_or_no_entry(machine: Machine) -> None:
    for sizes in ([], [0], [0, 0, 0]):
        tensors = randn(sizes, F32)
        got = run(machine, tensors, tensors, 0.5, GLOBAL)
        assert got.norms.tolist() == [0.0]
        assert got.factors.tolist() == [0.0]
        assert machine.norm(tensors, GLOBAL)[0].tolist() == [0.0]
    for scope in (TENSOR, AWP):
        got = run(machine, randn([0, 0], F32), randn([0, 0], F32), 0.5, scope)
        assert got.norms.tolist() == [0.0, 0.0]
        assert got.factors.tolist() == [0.0, 0.0]


# ---- Sizes -----------------------------------------------------------------------------------------------------------


def test_workspaces_of_huge_tensors(machine: Machine) -> None:
    """A double for each chunk, of 65536 entries where there are many; sizes are not limited to 32 bits."""
    assert machine.workspace([], GLOBAL) == 8
    assert machine.workspace([0, 1, 8192, 8193], GLOBAL) == 8 * 5
    assert machine.workspace([0, 1, 8192, 8193], AWP) == 16 * 5
    assert machine.workspace([2**40 + 1], TENSOR) == 8 * (2**24 + 1)


def test_an_access_beyond_an_array_is_found(machine: Machine) -> None:
    """The guard pages work: gradients of fewer entries than there are weights end the launch."""
    with pytest.raises(AssertionError, match="error 719"):
        machine.perturb(randn([2000], F32), randn([1999], F32), 0.05, GLOBAL)

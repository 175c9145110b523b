"""The Triton weight perturbation against the reference in float64: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from mmer_fast.ops import perturbation_reference as reference
from mmer_fast.triton import perturbation as kernels
from mmer_fast.triton import perturbation_table as table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
GLOBAL, TENSOR, AWP = kernels.GLOBAL, kernels.TENSOR, kernels.AWP
MODES = [(GLOBAL, False), (GLOBAL, True), (TENSOR, False), (TENSOR, True), (AWP, False)]
SIZES = (0, 1, 7, 129, 1134, 5000)  # the last takes two chunks
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}

# NumPy warns in the interpreter where a NaN or an infinity is computed with.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# Of a moved weight: half a unit in the last place, in float32 and float64 the rounding of the step as well.
TOLERANCE = {F64: 3e-16, F32: 1.2e-7, BF16: 2**-8, F16: 2**-11}


def randn(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=F64) * scale).to(dtype).to(DEVICE)


def lists(sizes: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    params = [randn(n, dtype=dtype) for n in sizes]
    return params, [randn(n, dtype=grad_dtype) for n in sizes], [torch.empty_like(w) for w in params]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


def assert_same_bits(got: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(bits(one), bits(other))


def check(
    params: list[Tensor],
    grads: list[Tensor],
    stash: list[Tensor],
    scope: int = GLOBAL,
    adaptive: bool = False,
    radius: float = 0.5,
    norms: Tensor | None = None,
    weight_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Perturbs and restores; the norms, the factors, every weight and every bit that must stay are compared."""
    before = [w.clone() for w in params]
    exact = [w.to(F64, copy=True) for w in params]
    kept = [torch.empty_like(w) for w in exact]
    wanted = reference.perturb_(exact, [g.to(F64) for g in grads], kept, norms, weight_norms, radius, scope, adaptive)
    got = kernels.perturb_(params, grads, stash, norms, weight_norms, radius, scope, adaptive)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == F64
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0, equal_nan=True)
    assert_same_bits(stash, before)
    of_step = 1e-15 if all(F64 in (w.dtype, g.dtype) for w, g in zip(params, grads, strict=True)) else 1e-6
    for i, (w, new) in enumerate(zip(params, exact, strict=True)):
        factor = got[1][0 if scope == GLOBAL else i]
        if factor == 0:
            assert_same_bits([w], [before[i]])
        elif w.numel():
            step = (new - kept[i]).abs().max().item()
            smallest = torch.finfo(w.dtype).smallest_normal * torch.finfo(w.dtype).eps
            torch.testing.assert_close(w.to(F64), new, rtol=TOLERANCE[w.dtype], atol=of_step * step + smallest)
    kernels.restore_(params, stash)
    assert_same_bits(params, before)
    return got


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "scope", "adaptive"),
    [
        *((dtype, dtype, *mode) for dtype in (F32, BF16) for mode in MODES),
        *((dtype, dtype, *mode) for dtype in (F64, F16) for mode in MODES[1::3]),
        *((*pair, *mode) for pair in ((F32, BF16), (BF16, F32), (F16, F64), (F64, F32)) for mode in MODES[::3]),
    ],
    ids=str,
)
def test_equals_the_reference(dtype: torch.dtype, grad_dtype: torch.dtype, scope: int, adaptive: bool) -> None:
    params, grads, stash = lists(SIZES, dtype, grad_dtype)
    check(params, grads, stash, scope, adaptive)
    norms, weight_norms = kernels.grad_norm(grads, params, scope, adaptive)
    wanted = reference.grad_norm(grads, params, scope, adaptive)
    torch.testing.assert_close(norms, wanted[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(weight_norms, wanted[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scope", [GLOBAL, TENSOR, AWP])
def test_dtypes_may_be_mixed(scope: int) -> None:
    kinds = [(F32, F32), (BF16, BF16), (F32, F32), (F64, F16), (F16, F16), (BF16, BF16)]
    params = [randn(100 + 5 * i, dtype=dtype) for i, (dtype, _) in enumerate(kinds)]
    grads = [randn(100 + 5 * i, dtype=dtype) for i, (_, dtype) in enumerate(kinds)]
    check(params, grads, [torch.empty_like(w) for w in params], scope)


@pytest.mark.parametrize(("scope", "adaptive"), MODES)
def test_norms_may_be_given(scope: int, adaptive: bool) -> None:
    params, grads, stash = lists((5, 300), F32, F32)
    norms, weight_norms = reference.grad_norm(grads, params, scope, adaptive)
    given = torch.stack([3 * norms, norms], dim=1)[:, 0]  # a stride of two
    check(params, grads, stash, scope, adaptive, norms=given, weight_norms=weight_norms if scope == AWP else None)


def test_awp_with_given_norms_but_no_weight_norms_moves_by_the_radius() -> None:
    params, grads, stash = lists((5, 300), F32, F32)
    check(params, grads, stash, AWP, norms=reference.grad_norm(grads, [], TENSOR, False)[0])


def test_plain_norms_need_no_weights() -> None:
    grads = lists((0, 40), F16, F16)[1]
    norms, weight_norms = kernels.grad_norm(grads, [], GLOBAL, False)
    torch.testing.assert_close(norms, reference.grad_norm(grads, [], GLOBAL, False)[0], rtol=1e-6, atol=0)
    assert weight_norms.shape == (0,)


def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CHUNK": 64, "STEP_CHUNK": 256, "PROGRAMS": 8}.items():
        monkeypatch.setattr(table, name, value)
    for name, value in {"BYTES": 1024, "PARTS_BLOCK": 4}.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.parametrize("scope", [GLOBAL, AWP])
def test_long_tensors_have_few_partial_norms(monkeypatch: pytest.MonkeyPatch, scope: int) -> None:
    chunks(monkeypatch)
    params, grads, stash = lists((2900, 0, 77, 1024), F32, F32)
    plan = table.plan_of(params, grads, stash, scope == GLOBAL)
    assert plan.parts == 6 + 1 + 1 + 2  # of 512 or 1024 entries, the power of two above a PROGRAMS-th of all
    assert len(plan.step[0].table) == 12 + 1 + 1 + 4
    check(params, grads, stash, scope)


def test_many_tensors() -> None:
    sizes = tuple(1 + i % 9 for i in range(40))
    check(*lists(sizes, F32, F32), TENSOR)


def layout(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A view [24, 6] in a storage that no kernel may write outside of the view, and that storage."""
    storage = randn(700, dtype=dtype)
    views: dict[str, Callable[[], Tensor]] = {
        "contiguous": lambda: storage[:144].view(24, 6),
        "offset": lambda: storage[1:145].view(24, 6),
        "transposed": lambda: storage[:144].view(6, 24).t(),
        "columns": lambda: storage[:480].view(24, 20)[:, 3:9],
        "every other": lambda: storage[1:289:2].view(24, 6),
    }
    return views[name](), storage


LAYOUTS = ["contiguous", "offset", "transposed", "columns", "every other"]


@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("others", ["same", "contiguous", "columns"])
def test_strides(param_layout: str, others: str) -> None:
    other = param_layout if others == "same" else others
    (w, storage), (g, _), (kept, stash_storage) = (layout(name, BF16) for name in (param_layout, other, other))
    outside, stash_outside = storage.clone(), stash_storage.clone()
    more = lists((30,), F32, F32)
    check([w, more[0][0]], [g, more[1][0]], [kept, more[2][0]], GLOBAL, True)
    outside.as_strided(w.shape, w.stride(), w.storage_offset()).copy_(w)
    stash_outside.as_strided(kept.shape, kept.stride(), kept.storage_offset()).copy_(kept)
    assert_same_bits([storage, stash_storage], [outside, stash_outside])
    norms = kernels.grad_norm([g], [w], TENSOR, True)[0]
    torch.testing.assert_close(norms, reference.grad_norm([g], [w], TENSOR, True)[0], rtol=1e-6, atol=0)


def test_a_tail_leaves_its_neighbours_alone() -> None:
    storage, kept = randn(6000), randn(6000)
    before = storage.clone(), kept.clone()
    params, stash = [storage[4:4103]], [kept[8:4107]]
    check(params, [randn(4099)], stash)
    kernels.perturb_(params, [randn(4099)], stash, None, None, 0.1, GLOBAL, False)
    for got, old, inside in ((storage, before[0], slice(4, 4103)), (kept, before[1], slice(8, 4107))):
        old[inside] = got[inside]
        assert_same_bits([got], [old])


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_restores_what_was_converted(dtype: torch.dtype) -> None:
    stash = [randn(300), randn(4, 6)]
    params = [torch.zeros_like(kept, dtype=dtype if i == 0 else F32) for i, kept in enumerate(stash)]
    kernels.restore_(params, stash)
    assert_same_bits(params, [stash[0].to(dtype), stash[1]])


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F32, 1e-30), (F32, 1e30), (F32, 1e-38), (F32, 1e-42), (F32, 5e37), (BF16, 1e-30), (BF16, 1e37), (F16, 3e-7),
     (F16, 1e4), (F64, 1e200), (F64, 1e-200), (F64, 1e-310)],
    ids=str,
)  # fmt: skip
def test_extreme_gradients(dtype: torch.dtype, scale: float) -> None:
    params = [randn(500, dtype=dtype), randn(6000, dtype=dtype)]
    grads = [randn(500, dtype=dtype, scale=scale), randn(6000, dtype=dtype, scale=scale)]
    for scope in (GLOBAL, AWP):
        radius = 0.5 if scale > 1e-300 else 1e-6  # a factor that is a float64
        norms, factors = check(params, grads, [torch.empty_like(w) for w in params], scope, radius=radius)
        assert norms.isfinite().all()
        assert (factors > 0).all()


def test_float16_of_norm_128000() -> None:
    grads = [torch.full((6400,), 1600.0, dtype=F16, device=DEVICE)]
    assert kernels.grad_norm(grads, [], GLOBAL, False)[0].item() == 128000
    check([randn(6400, dtype=F16)], grads, [randn(6400, dtype=F16)])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_one_large_entry_among_small_ones(dtype: torch.dtype, scale: float) -> None:
    grad = torch.full((700,), 1e-3 * scale, dtype=dtype, device=DEVICE)
    grad[600] = 5 * scale
    check([randn(700, dtype=dtype)], [grad], [randn(700, dtype=dtype)])


ADAPTIVE = {
    "opposite": ([1e30, 1e-30, 1e10], [1e-30, 1e30, 1e-10]),
    "both large": ([1e30, 2e30], [1e30, -3e30]),
    "both small": ([1e-30, 2e-30], [1e-30, -3e-30]),
    "subnormal weights": ([1e-44, 1.0], [1e20, -1e-24]),
    "subnormal gradients": ([1e38, 1.0], [1e-44, -1e-7]),
    "a large weight without gradient": ([1e38, 1e-30, 1e-30], [0.0, 1e-30, 2e-30]),
}


@pytest.mark.parametrize("case", ADAPTIVE)
def test_adaptive_products_beyond_float32(case: str) -> None:
    w, g = (torch.tensor(values, device=DEVICE) for values in ADAPTIVE[case])
    norms, factors = check([w], [g], [torch.empty_like(w)], GLOBAL, True)
    assert norms[0] > 0
    assert factors[0] > 0


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_long_constant_gradients_do_not_drift(dtype: torch.dtype) -> None:
    grad = torch.full((20000,), 0.1, dtype=dtype, device=DEVICE)
    norm = kernels.grad_norm([grad], [], GLOBAL, False)[0].item()
    assert norm == pytest.approx(grad[0].item() * 20000**0.5, rel=2e-7)


def awkward(n: int, dtype: torch.dtype) -> Tensor:
    """Weights of any bits: NaNs with payloads, infinities, both zeros, subnormals."""
    width = torch.finfo(dtype).bits
    patterns = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1) - 1, (n,), dtype=BITS[width // 8])
    w = patterns.view(dtype).to(DEVICE)
    w[:3] = torch.tensor([-0.0, float("inf"), 0.0], dtype=dtype)
    return w


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_without_a_usable_norm_every_bit_stays(dtype: torch.dtype, bad: float) -> None:
    params = [awkward(n, dtype) for n in (4500, 33)]
    grads = [torch.zeros_like(w) for w in params]
    grads[1][17] = bad
    before = [w.clone() for w in params]
    for scope in (GLOBAL, TENSOR):
        stash = [torch.empty_like(w) for w in params]
        norms, factors = kernels.perturb_(params, grads, stash, None, None, 0.5, scope, False)
        assert norms[-1] == bad if bad == 0 else not norms[-1].isfinite()
        assert (factors == 0).all()
        assert_same_bits(params, before)
        assert_same_bits(stash, before)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_one_group_moves_while_another_stays(dtype: torch.dtype) -> None:
    params = [randn(50, dtype=dtype), awkward(60, dtype), randn(4200, dtype=dtype)]
    grads = [randn(50, dtype=dtype), torch.zeros(60, dtype=dtype, device=DEVICE), randn(4200, dtype=dtype)]
    grads[2][4150] = float("nan")
    factors = check(params, grads, [torch.empty_like(w) for w in params], TENSOR)[1]
    assert (factors != 0).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_the_stash_keeps_every_bit_of_weights_that_move(dtype: torch.dtype) -> None:
    params, grads = [awkward(4200, dtype)], [randn(4200, dtype=dtype)]
    before, stash = [params[0].clone()], [torch.empty_like(params[0])]
    factors = kernels.perturb_(params, grads, stash, None, None, 0.5, GLOBAL, False)[1]
    assert factors[0] > 0
    assert_same_bits(stash, before)
    assert not torch.equal(bits(params[0]), bits(before[0]))
    kernels.restore_(params, stash)
    assert_same_bits(params, before)


@pytest.mark.parametrize("radius", [0.0, 1e-3, 1e300])
def test_radii(radius: float) -> None:
    params, grads, stash = lists((20,), F64, F64)
    factors = check(params, grads, stash, radius=radius)[1]
    assert (factors[0] > 0) == (radius > 0)


def test_a_radius_beyond_float32_moves_no_entry_without_gradient() -> None:
    params, grads, stash = lists((20,), F32, F32)
    grads[0][3] = 0
    before = params[0][3].item()
    kernels.perturb_(params, grads, stash, None, None, 1e300, GLOBAL, False)
    assert params[0][3].item() == before


def test_weights_of_norm_0_have_nowhere_to_go_with_awp() -> None:
    params, grads, stash = lists((20, 20), F32, F32)
    params[0][:] = -0.0
    factors = check(params, grads, stash, AWP)[1]
    assert (factors > 0).tolist() == [False, True]


@pytest.mark.parametrize(("scope", "groups"), [(GLOBAL, 1), (AWP, 2)])
def test_nothing_but_empty_tensors(scope: int, groups: int) -> None:
    norms, factors = check(*lists((0, 0), F32, F32), scope)
    assert norms.tolist() == factors.tolist() == [0.0] * groups


@pytest.mark.parametrize(("dtype", "eps"), [(F32, 2**-23), (F16, 2**-10), (BF16, 2**-7), (F64, 2**-52)], ids=str)
def test_rounds_to_nearest_and_ties_to_even(dtype: torch.dtype, eps: float) -> None:
    """One entry of gradient 1 moves by the radius exactly: half a unit in the last place of 1."""
    params = [torch.tensor([w], dtype=dtype, device=DEVICE) for w in (1.0, 1 + eps, 1 + 2 * eps, 1 + 3 * eps)]
    grads = [torch.ones_like(w) for w in params]
    kernels.perturb_(params, grads, [torch.empty_like(w) for w in params], None, None, eps / 2, TENSOR, False)
    assert [(w.item() - 1) / eps for w in params] == [0, 2, 2, 4]
    kernels.perturb_(params, [-g for g in grads], [torch.empty_like(w) for w in params], None, None, eps, TENSOR, False)
    assert [(w.item() - 1) / eps for w in params] == [-1, 1, 1, 3]


def test_two_runs_give_the_same_bits() -> None:
    params, grads, stash = lists((9000, 129), F32, F32)
    first = kernels.perturb_(params, grads, stash, None, None, 0.5, GLOBAL, True)
    moved = [w.clone() for w in params]
    kernels.restore_(params, stash)
    second = kernels.perturb_(params, grads, stash, None, None, 0.5, GLOBAL, True)
    assert_same_bits(params, moved)
    assert_same_bits(list(second), list(first))


def test_stable_pointers_build_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = table._build

    def counting(*arguments: Any) -> table.Plan:
        built.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(table, "_build", counting)
    params, grads, stash = lists((5, 40), F32, F32)
    for _ in range(3):
        check(params, grads, stash)
    assert len(built) == 2  # to perturb and to restore
    check(params, grads, stash, TENSOR)
    check(params, [g.clone() for g in grads], stash)
    kernels.perturb_([w[:3] for w in params], [g[:3] for g in grads], [s[:3] for s in stash], None, None, 1, 0, False)
    assert len(built) == 5


def test_old_tables_are_dropped() -> None:
    storage, kept = randn(100), randn(100)
    for n in range(1, table.CACHED + 5):
        kernels.restore_([storage[:n]], [kept[:n]])
    assert len(table._cache) == table.CACHED


def test_an_interrupt_between_two_launches_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [randn(30, dtype=F32), randn(24, 6, dtype=F32).t(), randn(30, dtype=BF16)]
    grads, stash = [randn(*w.shape) for w in params], [torch.empty(w.shape, dtype=w.dtype) for w in params]
    before = [w.clone() for w in params]
    step, calls = kernels.perturbation_step, []

    class Interrupted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            calls.append(grid)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return step[grid]

    monkeypatch.setattr(kernels, "perturbation_step", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        kernels.perturb_(params, grads, [s.to(DEVICE) for s in stash], None, None, 0.5, GLOBAL, False)
    assert len(calls) == 2
    for w, old in zip(params, before, strict=True):
        assert torch.equal(w, old)

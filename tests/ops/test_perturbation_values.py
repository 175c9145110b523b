"""The perturbation operators on every backend against the float64 reference, and that against the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from perturbation_cases import DTYPES, NORM, NORM_FLOAT64, SCALINGS, check, drawn, lists, strided

from mmer_fast import ops


@pytest.mark.parametrize(("scope", "adaptive"), SCALINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_dtypes(backend: str, device: str, dtype: torch.dtype, scope: str, adaptive: bool) -> None:
    check(backend, drawn(device, dtype), scope=scope, adaptive=adaptive)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_another_dtype(backend: str, device: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    check(backend, drawn(device, dtype, grad_dtype))
    check(backend, drawn(device, dtype, grad_dtype), adaptive=True)


@pytest.mark.parametrize(("scope", "adaptive"), SCALINGS)
def test_several_dtypes_in_one_call(backend: str, device: str, scope: str, adaptive: bool) -> None:
    params = [torch.randn(40 + i).to(device, DTYPES[i % 4]) for i in range(9)]
    grads = [torch.randn(40 + i).to(device, DTYPES[i // 2 % 4]) for i in range(9)]
    check(backend, lists(params, grads), scope=scope, adaptive=adaptive)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(backend: str, device: str, dtype: torch.dtype) -> None:
    check(backend, strided(device, dtype))
    check(backend, strided(device, dtype), scope="awp")


def test_a_tensor_of_many_chunks_and_many_tensors(backend: str, device: str, interpreted: bool) -> None:
    n = 40_000 if interpreted else 300_001
    check(backend, drawn(device, shapes=[(5,), (n,), (3, 7)]))
    check(backend, drawn(device, shapes=[(n,), (n // 3,)]), scope="tensor")
    count = 200 if interpreted else 1500
    check(backend, drawn(device, shapes=[(1 + i % 5,) for i in range(count)]))
    check(backend, drawn(device, shapes=[(1 + i % 5,) for i in range(count)]), scope="awp")


def test_memory_larger_than_the_caches(backend: str, device: str, interpreted: bool) -> None:
    """Beyond 8 MiB the CPU writes its copies around the caches."""
    if interpreted:
        pytest.skip("nothing is different in the interpreter")
    check(backend, drawn(device, shapes=[(1_500_000,), (1_000_003,), (17,)]))
    check(backend, drawn(device, torch.bfloat16, shapes=[(2_500_001,), (600_000,)]))


def test_the_step_is_eq_14() -> None:
    """The reference itself, by hand."""
    w, g = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)
    stash = torch.empty_like(w)
    norm, factor = ops.perturb_([w], [g], [stash], 0.5, backend="reference")
    assert (norm.item(), factor.item()) == (5.0, 0.1)
    torch.testing.assert_close(w, torch.tensor([1.3, -1.6], dtype=torch.float64))
    assert stash.tolist() == [1.0, -2.0]


def test_scopes_and_asam_by_hand(backend: str, device: str) -> None:
    def moved(**options: object) -> list[list[float]]:
        params = [torch.tensor([3.0, 4.0], device=device), torch.tensor([2.0], device=device)]
        grads = [torch.tensor([0.6, -0.8], device=device), torch.tensor([-4.0], device=device)]
        stash = [torch.empty_like(w) for w in params]
        ops.perturb_(params, grads, stash, 0.5, backend=backend, **options)
        return [(w.double() - s.double()).tolist() for w, s in zip(params, stash, strict=True)]

    norm = math.sqrt(1 + 16)
    assert moved()[0] == pytest.approx([0.3 / norm, -0.4 / norm], abs=1e-6)
    assert moved()[1] == pytest.approx([-2 / norm], abs=1e-6)
    assert moved(scope="tensor") == [pytest.approx([0.3, -0.4], abs=1e-6), pytest.approx([-0.5], abs=1e-6)]
    assert moved(scope="awp") == [pytest.approx([1.5, -2.0], abs=1e-6), pytest.approx([-1.0], abs=1e-6)]
    norm = math.sqrt(1.8**2 + 3.2**2 + 8**2)
    assert moved(adaptive=True)[0] == pytest.approx([0.5 * 9 * 0.6 / norm, -0.5 * 16 * 0.8 / norm], abs=1e-6)
    assert moved(adaptive=True)[1] == pytest.approx([-0.5 * 4 * 4 / norm], abs=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_norm_of_scaled_float32_gradients(backend: str, device: str, scale: float) -> None:
    """To 1e-6, where squares in float32 would be 0 or infinite."""
    grads = [(torch.randn(n) * scale).to(device) for n in (5000, 3)]
    exact = (torch.cat(grads).double() / scale).norm().item()
    assert ops.grad_norm(grads, backend=backend).item() / scale == pytest.approx(exact, rel=NORM)
    each = [(g.double() / scale).norm().item() for g in grads]
    assert (ops.grad_norm(grads, scope="tensor", backend=backend) / scale).tolist() == pytest.approx(each, rel=NORM)
    check(backend, lists([torch.randn_like(g) for g in grads], grads))


def test_norm_of_subnormal_gradients(backend: str, device: str) -> None:
    grads = [(torch.randn(1000).double() * 1e-42).float().to(device)]
    exact = (grads[0].double() * 1e42).norm().item()
    assert ops.grad_norm(grads, backend=backend).item() * 1e42 == pytest.approx(exact, rel=NORM)


def test_norm_of_float16_gradients_that_does_not_fit_float16(backend: str, device: str) -> None:
    grads = [torch.full((128, 128), 1000.0).to(device, torch.float16)]
    assert ops.grad_norm(grads, backend=backend).item() == pytest.approx(128000, rel=NORM)
    check(backend, lists([torch.randn(128, 128).to(device, torch.float16)], grads))


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200])
def test_norm_of_float64_gradients_whose_squares_do_not_fit(backend: str, device: str, scale: float) -> None:
    grads = [(torch.randn(1000, dtype=torch.float64) * scale).to(device), torch.zeros(3, device=device).double()]
    exact = (grads[0] / scale).norm().item()
    tolerance = 1e-9 if scale < 1e-300 else NORM_FLOAT64  # 1e-310 has few digits
    assert ops.grad_norm(grads, backend=backend).item() / scale == pytest.approx(exact, rel=tolerance)


@pytest.mark.parametrize(("weight", "gradient"), [(1e-25, 1e-25), (1e25, 1e25), (1e-30, 1e30)])
def test_adaptive_norm_does_not_lose_the_product(backend: str, device: str, weight: float, gradient: float) -> None:
    params, grads = [torch.randn(500).to(device) * weight], [torch.randn(500).to(device) * gradient]
    exact = (params[0].double() * grads[0].double()).norm().item()
    got = ops.grad_norm(grads, params=params, adaptive=True, backend=backend).item()
    assert got == pytest.approx(exact, rel=NORM)


@pytest.mark.parametrize(("scope", "adaptive"), [s for s in SCALINGS if s[0] != "awp"])
def test_given_norms_are_what_is_divided_by(backend: str, device: str, scope: str, adaptive: bool) -> None:
    case, twin = drawn(device), drawn(device)
    for mine, other in zip(twin.params + twin.grads, case.params + case.grads, strict=True):
        mine.copy_(other)
    params = case.params if adaptive else None
    norms = ops.grad_norm(case.grads, scope=scope, params=params, adaptive=adaptive, backend=backend)
    options = {"scope": scope, "adaptive": adaptive, "backend": backend}
    got, factors = ops.perturb_(case.params, case.grads, case.stash, 0.3, norms=2 * norms, **options)
    _, twin_factors = ops.perturb_(twin.params, twin.grads, twin.stash, 0.15, **options)
    torch.testing.assert_close(got, 2 * norms)
    torch.testing.assert_close(factors, twin_factors)
    for a, b in zip(case.params, twin.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

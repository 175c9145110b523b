"""Lists of weights and gradients for the perturbation operators, and what they must become."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmer_fast import ops
from mmer_fast.ops import perturbation_reference as reference
from mmer_fast.ops.perturbation_checks import SCOPES

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SCALINGS = [("global", False), ("tensor", False), ("awp", False), ("global", True), ("tensor", True)]
SHAPES = [(0,), (1,), (7,), (3, 43), (1134,), (2, 0, 3), ()]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Of a norm, relative: the bar. Float64 weights and gradients compute in float64 everywhere.
NORM = 1e-6
NORM_FLOAT64 = 1e-12


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(_BITS[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


@dataclass
class Lists:
    """What the operators take; `before` has copies of the weights."""

    params: list[Tensor]
    grads: list[Tensor]
    stash: list[Tensor]
    before: list[Tensor]

    def restored(self) -> bool:
        return all(same_bits(w, b) for w, b in zip(self.params, self.before, strict=True))

    def stashed(self) -> bool:
        return all(same_bits(s, b) for s, b in zip(self.stash, self.before, strict=True))


def lists(params: list[Tensor], grads: list[Tensor]) -> Lists:
    stash = [torch.full_like(w, torch.nan) for w in params]
    return Lists(params, grads, stash, [w.clone(memory_format=torch.contiguous_format) for w in params])


def drawn(
    device: str,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> Lists:
    """Standard normal weights and gradients."""
    params = [torch.randn(shape).to(device, dtype) for shape in shapes]
    return lists(params, [torch.randn(shape).to(device, grad_dtype or dtype) for shape in shapes])


def strided(device: str, dtype: torch.dtype = torch.float32) -> Lists:
    """Transposed, with holes, offset by an entry, and gradients laid out in another order than the weights."""
    wide = torch.randn(9, 8).to(device, dtype)
    params = [wide[:, ::2], torch.randn(6, 5).to(device, dtype).t(), torch.randn(31).to(device, dtype)[1:]]
    params += [torch.randn(4, 6).to(device, dtype), torch.randn(2, 3, 4, 5).to(device, dtype)]
    params[-1] = params[-1].contiguous(memory_format=torch.channels_last)
    grads = [torch.randn(9, 4), torch.randn(6, 5).t(), torch.randn(33)[2:-1], torch.randn(6, 4).t()]
    grads += [torch.randn(2, 3, 4, 5)]
    moved = [g.to(device, dtype) for g in grads]
    return lists(params, moved)


def check(backend: str, case: Lists, *, radius: float = 0.7, scope: str = "global", adaptive: bool = False) -> None:
    """Perturbs and restores on a backend; weights, norms, factors and stash against the float64 reference."""
    expected = [w.clone(memory_format=torch.preserve_format) for w in case.params]
    copies = [torch.empty_like(w) for w in expected]
    arguments = (None, None, radius, SCOPES[scope], adaptive)
    norms, factors = reference.perturb_(expected, case.grads, copies, *arguments)
    pointers = [w.data_ptr() for w in case.params]

    got_norms, got_factors = ops.perturb_(
        case.params, case.grads, case.stash, radius, scope=scope, adaptive=adaptive, backend=backend
    )
    if scope == "global":
        norms, factors = norms.reshape(()), factors.reshape(())
    wide = all(t.dtype == torch.float64 for t in (*case.params, *case.grads))
    tolerance = NORM_FLOAT64 if wide else NORM
    torch.testing.assert_close(got_norms, norms, rtol=tolerance, atol=0.0)
    torch.testing.assert_close(got_factors, factors, rtol=2 * tolerance, atol=0.0)
    assert case.stashed()
    for got, want, old, g in zip(case.params, expected, case.before, case.grads, strict=True):
        check_weight(got, want, old, wide and g.dtype == torch.float64)
    ops.restore_(case.params, case.stash, backend=backend)
    assert case.restored()
    assert pointers == [w.data_ptr() for w in case.params]


def check_weight(got: Tensor, want: Tensor, old: Tensor, wide: bool) -> None:
    """Within one rounding of the storage type; and of the step, which may be computed in float32."""
    if got.numel() == 0:
        return
    step = (want.double() - old.double()).abs()
    size = torch.maximum(want.double().abs(), old.double().abs())
    allowed = torch.finfo(got.dtype).eps * size + (1e-13 if wide else 1e-6) * step
    error = (got.double() - want.double()).abs()
    assert bool((error <= allowed).all()), f"error {float((error - allowed).max()):.3g} beyond what is allowed"

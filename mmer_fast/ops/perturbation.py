"""In-place adversarial weight perturbation over lists of tensors: two launches to perturb, one to restore.

    stash = w,   w <- w + gamma g/|g|_2        (RobMMR Eq. 14; SAM, ASAM and AWP are neighbours)

Subtracting the step again would not give w back (in float32 it leaves a few per cent of the entries changed, and more
each time), so the kernel that moves the weights also writes their old bits to a stash. These are the bare operators,
for those who keep their own lists; `mmer_fast.perturbed` is what a training loop wants: it finds parameters and
gradients, keeps the stash, restores after exceptions and understands sharded parameters.

The way of a call: `perturb_` chooses a backend; the dispatcher's operator is csrc/perturbation.cpp (CPU, CUDA),
kernels/triton/perturbation.py or ops/perturbation_reference.py; what it refuses is said by ops/perturbation_checks.py.
No operator here has a derivative: the perturbation is a constant of the loss that is computed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmer_fast.ops import _backends, _validate
from mmer_fast.ops import perturbation_checks as checks
from mmer_fast.ops import perturbation_reference as reference
from mmer_fast.ops._library import LIBRARY, define, implement, operator_of, qualified

_SCHEMAS = {
    "grad_norm": "(Tensor[] grads, Tensor[] params, int scope, bool adaptive) -> (Tensor norms, Tensor weight_norms)",
    "perturb_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] stash, Tensor? norms, Tensor? weight_norms, float radius, "
        "int scope, bool adaptive) -> (Tensor norms, Tensor factors)"
    ),
    "restore_": "(Tensor(a!)[] params, Tensor[] stash) -> ()",
}
_T = TypeVar("_T")
# Operators of one schema each; "" is the compiled one, whose kernel the dispatcher picks by device.
_SUFFIX = {"cpu": "", "cuda": "", "triton": "_triton", "reference": "_reference"}


def grad_norm(
    grads: Sequence[Tensor],
    *,
    scope: str = "global",
    params: Sequence[Tensor] | None = None,
    adaptive: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The L2 norm of gradients: one over all tensors, or one for each.

    Accumulates so widely that neither float16 gradients of norm 128000 nor float32 gradients of 1e-30 overflow or
    underflow. Not finite where a gradient is not. Not differentiable.

    Args:
        grads: tensors of any shapes and strides; float64, float32, bfloat16 or float16, mixed; one device.
        scope: ``"global"`` (one norm over all of them), ``"tensor"`` or ``"awp"`` (one each).
        params: the weights; only with `adaptive`, same shapes.
        adaptive: the norm of ``|w| g`` instead of ``g`` (ASAM, Kwon et al. 2021).
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        float64, ``()`` with scope ``"global"``, else ``(len(grads),)``.

    Raises:
        TypeError: something is not a dense floating-point tensor.
        ValueError: an unknown scope, no tensor, shapes or devices that do not fit.
    """
    number = checks.scope_number(scope, adaptive)
    grads = checks.some_tensors("grads", grads)
    if adaptive and params is None:
        raise ValueError("params must be given with adaptive=True: the norm is that of |w| g")
    weights = _validate.tensors("params", params) if adaptive else []
    number = reference.TENSOR if number == reference.AWP else number
    name = _backends.select("perturbation", grads[0].device.type, backend)
    run = partial(run_grad_norm, name, grads, weights, number, adaptive)
    norms = explained(name, partial(checks.check_norm, grads, weights), run)[0]
    return norms.reshape(()) if number == reference.GLOBAL else norms


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    stash: Sequence[Tensor],
    radius: float,
    *,
    scope: str = "global",
    adaptive: bool = False,
    norms: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Keeps the bits of `params` in `stash` and moves them up the gradients, in place: ``w += factor g``.

    | scope  | factor                              | of                                       |
    |--------|-------------------------------------|------------------------------------------|
    | global | radius / norm of all gradients      | RobMMR Eq. 14; SAM (Foret et al. 2021)   |
    | tensor | radius / norm of g, of each tensor  | the code published with RobMMR           |
    | awp    | radius norm of w / norm of g, each  | AWP (Wu et al. 2020)                     |

    With `adaptive` the step is ``factor w^2 g`` and the norm that of ``|w| g`` (ASAM, Kwon et al. 2021).

    A norm that is 0 or not finite gives factor 0, and those weights keep their bits; that is decided on the device,
    without waiting for it. The same inputs give the same bits. On CUDA this is two kernel launches for up to
    hundreds of tensors, made to be captured in a CUDA graph (compiled, not yet run on a GPU).

    Args:
        params: w, tensors of any shapes and strides; float64, float32, bfloat16 or float16, mixed. No two may share
            memory. They are modified as by ``torch.no_grad()``.
        grads: g, the shapes of `params`, any dtypes and strides.
        stash: receives the bits of `params`: same shapes and dtypes, for instance ``torch.empty_like`` of each.
        radius: gamma, the length of the step, >= 0.
        scope, adaptive: see above; ``adaptive`` goes with ``"global"`` and ``"tensor"``.
        norms: float64, as `grad_norm` returns them, where they are known already; not with scope ``"awp"``.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        The norms and the factors, both float64 and ``()`` with scope ``"global"``, else ``(len(params),)``.

    Raises:
        TypeError: something is not a dense floating-point tensor, or not a number.
        ValueError: an unknown scope, lists, shapes, dtypes or devices that do not fit, tensors that share memory, a
            radius that is negative or not finite. Nothing has been written then.
    """
    number = checks.scope_number(scope, adaptive)
    params, grads, stash = (
        checks.some_tensors("params", params), _validate.tensors("grads", grads), _validate.tensors("stash", stash)
    )  # fmt: skip
    checks.check_radius(radius)
    if norms is not None:
        norms = checks.given_norms("norms", norms, number, params)
    name = _backends.select("perturbation", params[0].device.type, backend)
    run = partial(run_perturb_, name, params, grads, stash, norms, None, radius, number, adaptive)
    got, factors = explained(name, partial(checks.check_perturb, params, grads, stash), run)
    _bump_versions(params, stash)
    return (got.reshape(()), factors.reshape(())) if number == reference.GLOBAL else (got, factors)


def restore_(params: Sequence[Tensor], stash: Sequence[Tensor], *, backend: str | None = None) -> None:
    """Copies the bits of `stash` back into `params`, in place, in one launch.

    Args:
        params, stash: as given to `perturb_`.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Raises:
        TypeError: something is not a dense floating-point tensor.
        ValueError: lists, shapes, dtypes or devices that do not fit.
    """
    params, stash = checks.some_tensors("params", params), _validate.tensors("stash", stash)
    name = _backends.select("perturbation", params[0].device.type, backend)
    explained(name, partial(checks.check_restore, params, stash), partial(run_restore_, name, params, stash))
    _bump_versions(params)


def explained(backend: str, check: Callable[[], object], run: Callable[[], _T]) -> _T:
    """Runs an operator; tensors that it cannot take are refused in the words of `check`.

    The compiled operators look at every tensor in any case, and refuse before they write anything. Looking at them from
    Python first would take longer than moving small ones; so `check` is for the backends in Python, and finds out what
    to say about what a compiled one has refused.
    """
    if backend not in ("cpu", "cuda") or torch.compiler.is_compiling():
        check()
        return run()
    try:
        return run()
    except Exception as error:
        refusal = error
    check()
    raise refusal


def run_perturb_(
    name: str,
    params: list[Tensor],
    grads: list[Tensor],
    stash: list[Tensor],
    norms: Tensor | None,
    weight_norms: Tensor | None,
    radius: float,
    scope: int,
    adaptive: bool,
) -> tuple[Tensor, Tensor]:
    """The operator on backend `name`, on checked arguments; leaves the version counters alone in eager mode."""
    with torch.no_grad():
        return _call("perturb_", name, params, grads, stash, norms, weight_norms, radius, scope, adaptive)


def run_restore_(name: str, params: list[Tensor], stash: list[Tensor]) -> None:
    """The operator on backend `name`, on checked arguments; leaves the version counters alone in eager mode."""
    with torch.no_grad():
        _call("restore_", name, params, stash)


def run_grad_norm(
    name: str, grads: list[Tensor], params: list[Tensor], scope: int, adaptive: bool
) -> tuple[Tensor, Tensor]:
    """The operator on backend `name`, on checked arguments: norms of the groups, and of the weights with scope awp."""
    with torch.no_grad():
        return _call("grad_norm", name, grads, params, scope, adaptive)


def bare_operator(kind: str, name: str) -> Any:
    """The C function behind an operator: no Python runs between its return and the caller's use of the result."""
    operator = _OPERATORS[kind, _SUFFIX[name]]
    return getattr(operator, "_op", operator)


def _call(kind: str, name: str, *arguments: Any) -> Any:
    operator = _OPERATORS[kind, _SUFFIX[name]]
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return operator(*arguments)


def _bump_versions(*lists: list[Tensor]) -> None:
    if not torch.compiler.is_compiling():  # functionalization counts by itself
        torch.clear_autocast_cache()  # casts of the weights, which autocast keeps by their addresses
        torch.autograd.graph.increment_version([t for tensors in lists for t in tensors if not t.is_inference()])


def _fake_norm(grads: Sequence[Tensor], params: Sequence[Tensor], scope: int, adaptive: bool) -> tuple[Tensor, Tensor]:
    checks.check_norm(list(grads), list(params))
    norms = grads[0].new_empty(1 if scope == reference.GLOBAL else len(grads), dtype=torch.float64)
    return norms, grads[0].new_empty(len(grads) if scope == reference.AWP else 0, dtype=torch.float64)


def _fake_perturb_(
    params: Sequence[Tensor], grads: Sequence[Tensor], stash: Any, norms: Any, weight_norms: Any, radius: float,
    scope: int, adaptive: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    checks.check_perturb(list(params), list(grads), list(stash))
    groups = params[0].new_empty(1 if scope == reference.GLOBAL else len(params), dtype=torch.float64)
    return groups, torch.empty_like(groups)


def _fake_restore_(params: Sequence[Tensor], stash: Sequence[Tensor]) -> None:
    checks.check_restore(list(params), list(stash))


def _triton(name: str) -> Any:
    def kernel(*arguments: Any) -> Any:
        from mmer_fast.triton import perturbation

        return getattr(perturbation, name)(*arguments)

    return kernel


def _count_versions(name: str, mutated: tuple[int, ...]) -> None:
    """Whoever calls the dispatcher's operator bumps the version counters of what it writes, as torch's own do."""
    operator = operator_of(name)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        _bump_versions(*(list(arguments[i]) for i in mutated))
        with torch._C._AutoDispatchBelowADInplaceOrView():  # what a kernel in Python writes is counted here
            return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    LIBRARY.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


_FAKES: dict[str, Callable[..., Any]] = {
    "grad_norm": _fake_norm,
    "perturb_": _fake_perturb_,
    "restore_": _fake_restore_,
}
_MUTATED: dict[str, tuple[int, ...]] = {"grad_norm": (), "perturb_": (0, 2), "restore_": (0,)}
_OPERATORS: dict[tuple[str, str], Any] = {}
for _kind, _schema in _SCHEMAS.items():
    for _suffix in ("", "_triton", "_reference"):
        # An in-place operator's name ends in an underscore.
        _name = f"{_kind.removesuffix('_')}{_suffix}{'_' if _kind.endswith('_') else ''}"
        define(_name, _schema)
        if _suffix:
            implement(_name, _triton(_kind) if _suffix == "_triton" else getattr(reference, _kind))
        torch.library.register_fake(qualified(_name), _FAKES[_kind])
        if _MUTATED[_kind]:
            _count_versions(_name, _MUTATED[_kind])
        _OPERATORS[_kind, _suffix] = operator_of(_name)

"""`perturbed` and its split form: find parameters and gradients, check them, perturb."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmer_fast.ops import _backends, _validate
from mmer_fast.ops import perturbation as operators
from mmer_fast.ops import perturbation_checks as checks
from mmer_fast.perturbation import sharded, stash
from mmer_fast.perturbation.handle import Perturbation, PerturbationInfo, modified_text
from mmer_fast.perturbation.selection import Grads, Select, Target, check_gradient, choose, gradients


class _Perturbed(AbstractContextManager[PerturbationInfo]):
    def __init__(self, start: Callable[[], Perturbation]) -> None:
        self._start = start
        self._handle: Perturbation | None = None

    def __enter__(self) -> PerturbationInfo:
        if self._handle is not None:
            raise RuntimeError("this block was entered already; call mf.perturbed again for another perturbation")
        self._handle = self._start()
        return self._handle.info

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        assert self._handle is not None
        if not self._handle.active:
            return
        modified = self._handle.restore_now()
        if modified and kind is None:
            raise RuntimeError(modified_text(modified))


def perturbed(
    module_or_params: Target,
    radius: float,
    *,
    scope: str = "global",
    adaptive: bool = False,
    grads: Grads | None = None,
    inv_scale: float | Tensor | None = None,
    select: Select | None = None,
    norm: Tensor | None = None,
    average_over: Any = None,
    backend: str | None = None,
) -> AbstractContextManager[PerturbationInfo]:
    """A ``with`` block inside of which the parameters are a step up the loss: ``w + radius g/|g|``.

    Run forward *and* backward of the perturbed loss inside, the optimizer's step outside. When the block ends, by an
    exception or an interrupt too, every parameter has its old bits again. Storage, ``data_ptr``, hooks,
    ``requires_grad`` and optimizer state stay what they are, so compiled modules go on working, and CUDA graphs should
    (not yet tried on a GPU); no host synchronisation takes place.

    Gradients are read and left alone: those of the perturbed loss are added to them, unless `zero_grad` comes first.
    FSDP2 wants its ``reset_iter_state()`` after an exception in the middle of a pass, here as anywhere.

    Args:
        module_or_params: a module, or an iterable of tensors or of (name, tensor). Each parameter counts once; those
            that are frozen, or have no gradient, are left out. State dicts of a *module* taken inside hold the clean
            weights.
        radius: gamma >= 0, the L2 norm of the step.
        scope: what has this norm: ``"global"`` (all parameters together: RobMMR Eq. 14, SAM), ``"tensor"`` (each: the
            code published with RobMMR) or ``"awp"`` (each, times the norm of the parameter: AWP).
        adaptive: scale entries by their weights (ASAM): ``w + radius w^2 g/||w| g|``.
        grads: g, in the order of the parameters (None: left out) or by name; None: their ``.grad``.
        inv_scale: what unscales the gradients under a gradient scaler, a number or a tensor. The step does not depend
            on it; `PerturbationInfo` does.
        select: for a module: name patterns (``"encoder.*"``), types of modules, functions (name, parameter) -> bool,
            or a sequence of these.
        norm: float64 tensor, the norm to divide by, from `mmer_fast.ops.grad_norm`; None computes it. Not with awp.
        average_over: a process group over which the gradients are averaged first, into copies, for DDP whose first
            backward ran under ``no_sync()``; every rank gives the same parameters, and one that is without a gradient
            here alone counts as zero. None: each rank steps along the gradient that it has, the mean of all after
            DDP's own backward, that of its share of the batch after ``no_sync()``. The backward inside is DDP's as
            ever: it averages all of ``.grad``, what was there before too; ``no_sync()`` inside leaves that to a later
            backward or to you. DTensors (FSDP2, tensor parallelism) go without: their norms are over all shards.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        A context manager that gives a `PerturbationInfo`.

    Raises:
        TypeError, ValueError: on entering, an argument that cannot be right; nothing has been written then.
        RuntimeError: on entering, a parameter is perturbed already; on leaving, the parameters were modified inside the
            block. They are restored, the modification is lost.
    """
    return _Perturbed(
        lambda: perturb_(
            module_or_params,
            radius,
            scope=scope,
            adaptive=adaptive,
            grads=grads,
            inv_scale=inv_scale,
            select=select,
            norm=norm,
            average_over=average_over,
            backend=backend,
        )
    )


def perturb_(
    module_or_params: Target,
    radius: float,
    *,
    scope: str = "global",
    adaptive: bool = False,
    grads: Grads | None = None,
    inv_scale: float | Tensor | None = None,
    select: Select | None = None,
    norm: Tensor | None = None,
    average_over: Any = None,
    backend: str | None = None,
) -> Perturbation:
    """The split form of `perturbed`, with its arguments: perturbs now; the handle's `restore_` ends it.

    Returns:
        The handle. Keep it, since a handle that goes away restores the parameters, with a ResourceWarning.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("mmer_fast.perturbed works outside of torch.compile: compile the model, not the block")
    number = checks.scope_number(scope, adaptive)
    checks.check_radius(radius)
    inv_scale = _checked_inv_scale(inv_scale)
    module = module_or_params if isinstance(module_or_params, nn.Module) else None
    if module is not None:
        sharded.drop_gathered(module)
    chosen = choose(module_or_params, select)
    found = gradients(chosen, grads)
    if average_over is not None and grads is None:
        found = sharded.zeros_where_missing(chosen, found)
    pairs = [(name, p, g) for (name, p), g in zip(chosen, found, strict=True) if g is not None]
    if not pairs:
        raise ValueError(
            f"none of the {len(chosen)} parameters has a gradient: run backward() before, or give grads"
            if chosen
            else "module_or_params must hold at least one parameter, got none"
        )
    named = [(name, p) for name, p, _ in pairs]
    records = stash.records_of([p for _, p in named])
    stash.refuse_perturbed(named, records)
    sharded.refuse_flat(named)

    values, slopes = [p for _, p in named], [g for _, _, g in pairs]
    meshed = sharded.any_dtensor((*values, *slopes))
    if meshed:
        if average_over is not None:
            raise ValueError("average_over is for plain tensors: gradients of DTensors are reduced by their own rules")
        values = [sharded.local(p) for p in values]
    check = partial(_check_tensors, pairs, values)
    if meshed or average_over is not None:  # whose exchanges come before the operator, which looks at tensors by itself
        check()
    if meshed:
        slopes = [sharded.local(sharded.aligned_gradient(*pair)) for pair in pairs]
    if isinstance(inv_scale, Tensor) and (inv_scale.is_meta or inv_scale.dim() > 0 or not inv_scale.is_cpu):
        _validate.same_device("inv_scale", inv_scale, values[0], "the parameters")
    chosen_backend = _backends.select("perturbation", values[0].device.type, backend)
    if average_over is not None:
        slopes = sharded.averaged(slopes, average_over)
    norms, weight_norms = None, None
    if norm is not None:
        norms = checks.given_norms("norm", norm, number, values)
    elif meshed:
        norms, weight_norms = sharded.norms_over_mesh(
            chosen_backend, [p for _, p in named], values, slopes, number, adaptive
        )

    handle = Perturbation(named, values, records, chosen_backend)
    if module is not None:
        handle.guard(module)
    perturb_now = partial(handle.perturb_now, slopes, norms, weight_norms, float(radius), number, adaptive)
    norms, factors = operators.explained(chosen_backend, check, perturb_now)
    names = tuple(name for name, _ in named)
    handle.info = PerturbationInfo(names, norms, factors, inv_scale, scope == "global")
    return handle


def _checked_inv_scale(value: float | Tensor | None) -> float | Tensor | None:
    if isinstance(value, Tensor):
        if _validate.floating_tensor("inv_scale", value).numel() != 1:
            raise ValueError(f"inv_scale must hold one number, got the shape {tuple(value.shape)}")
        return value
    return None if value is None else _validate.number("inv_scale", value, above=0.0)


def _check_tensors(pairs: Sequence[tuple[str, Tensor, Tensor]], values: Sequence[Tensor]) -> None:
    """
    Args:
        pairs: name, parameter, gradient.
        values: what is here of the parameters.
    """
    first = values[0].device
    for (name, parameter, gradient), value in zip(pairs, values, strict=True):
        check_gradient(name, parameter, gradient)
        if value.device != first:
            expected = f"the device of {pairs[0][0]!r} ({first})"
            raise ValueError(f"parameter {name!r} must be on {expected}, got {value.device}")
    checks.check_distinct({"params": list(values)}, [name for name, _, _ in pairs])

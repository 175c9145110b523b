"""`perturbed` and its split form: find, perturb, restore whatever happens.

An interrupt may come between any two lines of Python. The operator is therefore called through C alone (`_run_once`),
so that whether it has run is never in doubt; and a handle that nobody restored restores when it goes away.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn

from mmer_fast.ops import _backends, _validate
from mmer_fast.ops import perturbation as operators
from mmer_fast.perturbation import sharded, stash, versions
from mmer_fast.perturbation.selection import Grads, Named, Select, Target, choose, gradients


@dataclass(frozen=True)
class PerturbationInfo:
    """What a perturbation did, as tensors on the device: reading them waits for it, nothing else does.

    Attributes:
        names: of the parameters that were perturbed, in order.
    """

    names: tuple[str, ...]
    _norms: Tensor
    _factors: Tensor
    _inv_scale: float | Tensor | None
    _global: bool

    @property
    def norm(self) -> Tensor:
        """float64, the norm of the gradients (times `inv_scale`): ``()``, or one for each of `names`."""
        return self._shaped(self._norms if self._inv_scale is None else self._norms * self._inv_scale)

    @property
    def factor(self) -> Tensor:
        """float64, what multiplied the gradients (those times `inv_scale`); 0 where nothing moved. Shape of `norm`."""
        return self._shaped(self._factors if self._inv_scale is None else self._factors / self._inv_scale)

    @property
    def skipped(self) -> Tensor:
        """bool, whether a norm was not finite, so that the weights were left alone. Shape of `norm`."""
        return self._shaped(~self._norms.isfinite())

    def _shaped(self, x: Tensor) -> Tensor:
        return x.reshape(()) if self._global else x


class Perturbation:
    """Parameters that are perturbed, until `restore_`. Made by `perturb_`.

    Attributes:
        info: what was done.
    """

    info: PerturbationInfo
    _active = False
    _hooks: Sequence[Any] = ()

    def __init__(self, named: Named, values: list[Tensor], records: list[stash.Record], backend: str) -> None:
        self._named, self._values, self._records, self._backend = named, values, records, backend
        self._stash = [record.stash_for(value) for record, value in zip(records, values, strict=True)]
        # A DTensor counts versions of its own, beside those of its local values.
        watched = {id(t): t for t in (*(p for _, p in named), *values)}
        self._watched = [t for t in watched.values() if not t.is_inference()]
        self._versions: list[int] | None = None
        self._number = 0
        self._module: nn.Module | None = None
        self._active = False

    @property
    def active(self) -> bool:
        """Whether the parameters are perturbed now."""
        return self._active

    def restore_(self) -> None:
        """Gives the parameters their bits back, in place.

        Raises:
            RuntimeError: they are restored already, or were modified while they were perturbed (by an optimizer's step
                or load_state_dict inside the block): they are restored all the same, and that modification is lost.
        """
        if not self._active:
            raise RuntimeError("these parameters are restored already: a perturbation is restored once")
        modified = self._restore()
        if modified:
            raise RuntimeError(_modified(modified))

    def _perturb(self, *arguments: Any) -> None:
        results: list[tuple[Tensor, Tensor]] = []
        operator = operators.bare_operator("perturb_", self._backend)
        try:
            for record in self._records:
                record.perturbed = True
            self._active = True
            _run_once(operator, (self._values, arguments[0], self._stash, *arguments[1:]), results)
            self._number = versions.next_number()
            self._versions = [t._version for t in self._watched]
            versions.write(self._watched, [self._number] * len(self._watched))
            torch.clear_autocast_cache()  # casts of the weights, which autocast keeps by their addresses
        except BaseException:
            self._active = bool(results)  # the stash is older than the weights unless the operator has run
            self._restore() if results else self._forget()
            raise
        self._norms, self._factors = results[0]

    def _restore(self) -> list[str]:
        """Restores; returns the names of parameters that somebody else has changed in between."""
        modified = []
        if self._versions is not None:
            modified = [name for name, p in self._named if not p.is_inference() and p._version != self._number]
        done: list[None] = []
        try:
            self._finish(done)
        except BaseException:  # an interrupt in the middle: first the weights, then the interrupt
            if self._active:
                self._finish(done)
            raise
        return modified

    def _finish(self, done: list[None]) -> None:
        if not done:
            _run_once(operators.bare_operator("restore_", self._backend), (self._values, self._stash), done)
        if self._versions is not None:
            versions.write(self._watched, self._versions)
        torch.clear_autocast_cache()
        self._forget()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for record in self._records:
            record.perturbed = False
        self._active = False
        if self._module is not None:
            sharded.drop_gathered(self._module)

    def _guard_state_dicts(self, module: nn.Module) -> None:
        """While perturbed, state dicts hold the clean weights."""
        hooks: list[Any] = []
        self._hooks = hooks
        perturbed = {id(parameter) for _, parameter in self._named}
        for owner in module.modules():
            if not perturbed.isdisjoint(map(id, owner._parameters.values())):
                hooks.append(owner.register_state_dict_post_hook(_save_clean_values))

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        for hook in self._hooks:
            hook.remove()
        if self._active:
            self._restore()
            warnings.warn(
                "a perturbation that nobody restored was restored because its handle went away: keep what perturb_ "
                "returns, and call its restore_()",
                ResourceWarning,
                stacklevel=2,
            )


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
        modified = self._handle._restore()
        if modified and kind is None:
            raise RuntimeError(_modified(modified))


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
    ``requires_grad`` and optimizer state stay what they are, so compiled modules and CUDA graphs go on working; no
    host synchronisation takes place.

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

    Raises (on entering):
        TypeError, ValueError: an argument that cannot be right; nothing has been written then.
        RuntimeError: a parameter is perturbed already.

    Raises (on leaving):
        RuntimeError: the parameters were modified inside the block. They are restored, the modification is lost.
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
        The handle. Keep it: a handle that goes away restores the parameters, with a ResourceWarning.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("mmer_fast.perturbed works outside of torch.compile: compile the model, not the block")
    number = operators.scope_number(scope, adaptive)
    operators.check_radius(radius)
    if inv_scale is not None and not isinstance(inv_scale, Tensor):
        _validate.number("inv_scale", inv_scale, above=0.0)
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
    meshed = any(map(sharded.is_dtensor, (*values, *slopes)))
    if meshed:
        if average_over is not None:
            raise ValueError("average_over is for plain tensors: gradients of DTensors are reduced by their own rules")
        slopes = [sharded.local(sharded.aligned_gradient(*pair)) for pair in pairs]
        values = [sharded.local(p) for p in values]
    _same_device(named, values)
    operators.check_distinct({"params": values}, [name for name, _ in named])
    chosen_backend = _backends.select("perturbation", values[0].device.type, backend)
    if average_over is not None:
        slopes = sharded.averaged(slopes, average_over)
    norms, weight_norms = None, None
    if norm is not None:
        norms = operators.given_norms("norm", norm, number, values)
    elif meshed:
        norms, weight_norms = sharded.norms_over_mesh(
            chosen_backend, [p for _, p in named], values, slopes, number, adaptive
        )

    handle = Perturbation(named, values, records, chosen_backend)
    if module is not None:
        handle._module = module
        handle._guard_state_dicts(module)
    handle._perturb(slopes, norms, weight_norms, float(radius), number, adaptive)
    handle.info = PerturbationInfo(
        tuple(name for name, _ in named), handle._norms, handle._factors, inv_scale, scope == "global"
    )
    return handle


def _run_once(operator: Any, arguments: tuple[Any, ...], results: list[Any]) -> None:
    """results.append(operator(*arguments)) without a moment in which an interrupt finds the one done, not the other."""
    with torch._C._AutoDispatchBelowADInplaceOrView():  # below autograd too: nothing is recorded
        results.extend(starmap(operator, (arguments,)))


def _save_clean_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and prefix + name in state_dict:
            clean = stash.clean_values(parameter)
            if clean is not None:
                state_dict[prefix + name] = sharded.like(parameter, clean)


def _same_device(named: Named, values: Sequence[Tensor]) -> None:
    for (name, _), value in zip(named, values, strict=True):
        if value.device != values[0].device:
            raise ValueError(
                f"parameter {name!r} must be on the device of {named[0][0]!r} ({values[0].device}), got {value.device}"
            )


def _modified(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"parameter {shown} was modified while perturbed; the weights of before the perturbation are back and that "
        "modification is lost. Put optimizer.step() and load_state_dict() after the block"
    )

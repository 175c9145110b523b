"""Sharpness-aware minimization: the base optimizer's step, with the gradient found a step up the loss.

    w' = w + rho g(w)/|g(w)|,    w <- base step of w along g(w')         SAM, Foret et al. 2021
    w' = w + rho w^2 g/||w| g|   with adaptive=True                      ASAM, Kwon et al. 2021

The interface is the one that users of SAM packages know: `first_step`, a second forward and backward pass,
`second_step`; or `step(closure)`. The weights are moved in place and come back bit for bit (`mmer_fast.perturb_`).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from mmer_fast.ops import _validate
from mmer_fast.ops.perturbation import grad_norm
from mmer_fast.ops.perturbation_checks import scope_number
from mmer_fast.perturbation import Perturbation, PerturbationInfo, perturb_
from mmer_fast.perturbation.sharded import any_dtensor

_OWN = ("rho", "adaptive")  # of the options in a parameter group


class SAM(torch.optim.Optimizer):
    """SAM, or ASAM with ``adaptive=True``, around any optimizer.

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

        loss(model(x), y).backward()
        optimizer.first_step(zero_grad=True)     # to w'
        loss(model(x), y).backward()             # the gradient there
        optimizer.second_step(zero_grad=True)    # back to w, and the base optimizer's step

    Learning-rate schedulers, ``zero_grad``, ``state_dict`` and hooks work on it as on the base optimizer, whose
    parameter groups and state it shares. ``torch.distributed.checkpoint`` takes `base_optimizer`.

    With a gradient scaler: ``scaler.scale(loss).backward()`` twice, then ``second_step(scaler=scaler)`` in the place of
    ``scaler.step``, and ``scaler.update()``. Where gradients of either pass are not finite the weights stay, and the
    scaler lowers its scale. ``scaler.unscale_(optimizer)``, to clip gradients, comes after the second pass only.

    Args:
        params: parameters or parameter groups; a group may have a `rho` of its own. The step is then that long in the
            group, along the gradient normalised over all groups (plain tensors, where `scope` is "global").
        base_optimizer: class (or function) that makes the base optimizer from parameter groups.
        rho: the radius, >= 0.
        adaptive: ASAM.
        scope: what has the norm `rho`, ``"global"``, ``"tensor"`` or ``"awp"``; see `mmer_fast.perturbed`.
        average_over, backend: see `mmer_fast.perturbed`.
        **kwargs: for the base optimizer.

    Attributes:
        base_optimizer: the optimizer that takes the step.
        last_info: what the latest `first_step` did, a `PerturbationInfo` for each `rho`.

    Raises:
        TypeError: `rho` is not a number, or `base_optimizer` does not make an optimizer.
        ValueError: `rho` is negative or not finite, an unknown `scope`, or a base optimizer that has an option called
            "rho" or "adaptive" itself (Adadelta), which would share its value, or needs a closure to step (LBFGS).
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        scope: str = "global",
        average_over: Any = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                "base_optimizer must be a class or function that makes an optimizer, got an optimizer: "
                "SAM.around(optimizer) takes one that exists"
            )
        if not callable(base_optimizer) or (
            isinstance(base_optimizer, type) and not issubclass(base_optimizer, torch.optim.Optimizer)
        ):
            shown = getattr(base_optimizer, "__name__", type(base_optimizer).__name__)
            raise TypeError(f"base_optimizer must be a class or function that makes an optimizer, got {shown}")
        if not isinstance(params, Iterable):
            raise TypeError(f"params must be parameters or parameter groups, got {type(params).__name__}")
        self._start(scope, average_over, backend)
        scope_number(scope, adaptive)
        super().__init__(params, {"rho": rho, "adaptive": adaptive})
        base = base_optimizer(self.param_groups, **kwargs)
        _check_base(base)
        self._share(base)

    @classmethod
    def around(
        cls,
        base_optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        scope: str = "global",
        average_over: Any = None,
        backend: str | None = None,
    ) -> SAM:
        """SAM around an optimizer that exists already, its state included. Arguments and errors as those of the class.

        Parameter groups that have a `rho` keep it.
        """
        _check_base(base_optimizer)
        scope_number(scope, adaptive)
        _check_rho(rho)
        sam = cls.__new__(cls)
        sam._start(scope, average_over, backend)
        torch.optim.Optimizer.__init__(sam, base_optimizer.param_groups, {"rho": rho, "adaptive": adaptive})
        sam._share(base_optimizer)
        return sam

    def _start(self, scope: str, average_over: Any, backend: str | None) -> None:
        self.base_optimizer: torch.optim.Optimizer | None = None
        self.last_info: list[PerturbationInfo] = []
        self._options = {"scope": scope, "average_over": average_over, "backend": backend}
        self._handles: list[Perturbation] = []
        self._second_gradient = False  # whether the gradients are those of a perturbed pass

    def _share(self, base: torch.optim.Optimizer) -> None:
        """Makes groups, state, defaults and the hooks of state dicts of `base` those of this optimizer too."""
        self.base_optimizer = base
        self.defaults.update(base.defaults)
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            setattr(self, f"_optimizer_{kind}_hooks", getattr(base, f"_optimizer_{kind}_hooks"))
        own = weakref.ref(self)  # no cycle: an optimizer that goes away frees its state at once

        def adopt(base: torch.optim.Optimizer) -> None:
            if (sam := own()) is not None:
                sam._adopt(base)

        base.register_load_state_dict_post_hook(adopt)  # loading into the base alone gives it new groups
        self._adopt(base)

    def _adopt(self, base: torch.optim.Optimizer) -> None:
        for group, own in zip(base.param_groups, chain(self.param_groups, repeat(self.defaults)), strict=False):
            for name in _OWN:
                group.setdefault(name, own[name])
        self.param_groups, self.state = base.param_groups, base.state

    def __getstate__(self) -> dict[str, Any]:
        if self._handles:
            raise RuntimeError("SAM cannot be copied or pickled between first_step and second_step")
        return {"base_optimizer": self.base_optimizer, "defaults": self.defaults, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        base = state["base_optimizer"]
        self._start(**state["options"])
        super().__setstate__({"defaults": state["defaults"], "param_groups": base.param_groups})
        self._share(base)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of every optimizer; the group may have `rho`.

        Raises:
            TypeError, ValueError: `rho` is not a number, or negative or not finite.
        """
        if isinstance(param_group, dict):
            _check_rho(param_group.get("rho", self.defaults["rho"]))
        if self.base_optimizer is None:
            super().add_param_group(param_group)
        else:
            self.base_optimizer.add_param_group({**{name: self.defaults[name] for name in _OWN}, **param_group})

    @property
    def perturbed(self) -> bool:
        """Whether the weights are those between `first_step` and `second_step`."""
        return bool(self._handles)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, inv_scale: float | Tensor | None = None) -> None:
        """Moves the weights up their gradients, by norm `rho`.

        Args:
            zero_grad: clears the gradients afterwards, which nearly always is wanted.
            inv_scale: of a gradient scaler; only `last_info` depends on it.

        Raises:
            RuntimeError: the weights are perturbed already.
            TypeError, ValueError: no parameter has a gradient, a `rho` is not a number >= 0, or the groups have several
                where they cannot.
        """
        if self._handles:
            raise RuntimeError("first_step was called twice: second_step or restore_ comes next")
        groups = [(group, params) for group in self.param_groups if (params := _with_gradient(group))]
        if not groups:
            raise ValueError("no parameter has a gradient: run backward() before first_step")
        if self._options["average_over"] is not None:  # other ranks may have the gradients that are missing here
            groups = [(group, group["params"]) for group in self.param_groups]
        for group, _ in groups:
            _check_rho(group["rho"])
        if len({group["adaptive"] for group, _ in groups}) > 1:
            raise ValueError("adaptive must be the same in all parameter groups")
        options = {**self._options, "adaptive": groups[0][0]["adaptive"], "inv_scale": inv_scale}
        by_rho: dict[float, list[Tensor]] = {}
        for group, params in groups:
            by_rho.setdefault(group["rho"], []).extend(params)
        norm = self._common_norm(by_rho, options["adaptive"]) if len(by_rho) > 1 else None
        try:
            for rho, params in by_rho.items():
                self._handles.append(perturb_(params, rho, norm=norm, **options))
        except BaseException:
            self.restore_()
            raise
        self.last_info = [handle.info for handle in self._handles]
        self._second_gradient = True
        if zero_grad:
            self.zero_grad()

    def _common_norm(self, by_rho: dict[float, list[Tensor]], adaptive: bool) -> Tensor | None:
        """The norm of all groups together, which are perturbed one after the other."""
        if self._options["scope"] != "global":
            return None
        params = [p for group in by_rho.values() for p in group]
        if any_dtensor(params) or self._options["average_over"] is not None:
            raise ValueError("rho must be the same in all parameter groups where gradients are sharded or averaged")
        grads = [p.grad for p in params if p.grad is not None]
        weights = params if adaptive else None
        return grad_norm(grads, params=weights, adaptive=adaptive, backend=self._options["backend"])

    def restore_(self) -> None:
        """Back to the weights of before `first_step`, without a step; nothing where they are there already.

        `second_step` may still follow, and so may the next `first_step`.

        Raises:
            RuntimeError: the weights were modified in between; they are restored all the same.
        """
        handles, self._handles = self._handles, []
        errors = []
        for handle in reversed(handles):  # parameters that are views of one buffer share a version counter
            if handle.active:
                try:
                    handle.restore_()
                except RuntimeError as error:  # restore the others all the same
                    errors.append(error)
        if errors:
            raise errors[0]

    def second_step(self, zero_grad: bool = False, *, scaler: Any = None) -> None:
        """Back to the weights of before, then the base optimizer's step along the gradients found in between.

        Args:
            zero_grad: clears the gradients afterwards.
            scaler: a ``torch.amp.GradScaler``, which unscales and leaves out the step where a gradient of either pass
                is not finite; call its ``update()`` afterwards.

        Raises:
            RuntimeError: `first_step` has not been called.
        """
        if not self._second_gradient:
            raise RuntimeError("second_step comes after first_step and a second backward pass")
        self.restore_()
        try:
            if scaler is None:
                self.step()
            else:
                self._tell_of_first_pass(scaler)
                scaler.step(self)
        finally:
            self._second_gradient = False
        if zero_grad:
            self.zero_grad()

    def _tell_of_first_pass(self, scaler: Any) -> None:
        """Has the scaler see gradients that were not finite in the first pass, on the device, as it sees the second's.

        A scaler unscales and looks at the gradients of an optimizer once between two updates.
        """
        if not scaler.is_enabled():
            return
        if not (found := scaler._found_inf_per_device(self)):
            scaler.unscale_(self)
            found = scaler._found_inf_per_device(self)
        skipped = torch.stack([info.skipped.any() for info in self.last_info]).any()
        for found_inf in found.values():
            found_inf += skipped.to(found_inf)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A whole step of SAM with a closure; without, the end of one (which `second_step` calls).

        Args:
            closure: clears the gradients, computes the loss, runs backward and returns the loss. It is called for the
                perturbed pass, and before that for the first one unless there are gradients already (other than None).
                The gradients are cleared afterwards, so that the next step does not take them for those of its first
                pass. If it raises, the weights are restored and the gradients cleared.

        Returns:
            What the first call of the closure returned.

        Raises:
            RuntimeError: without a closure, and `first_step` has not been called (unless all learning rates are 0, by
                which torch.distributed.checkpoint has the state of a new optimizer made).
            ValueError: no parameter has a gradient after the first pass.
        """
        if closure is None:
            if not self._second_gradient and any(group.get("lr", 1.0) != 0 for group in self.param_groups):
                raise RuntimeError("step needs a closure, or first_step and a second backward pass before it")
            return self._finish()
        closure = torch.enable_grad()(closure)
        losses = []
        try:
            if not any(map(_with_gradient, self.param_groups)):
                losses.append(closure())
            self.first_step(zero_grad=True)
            losses.append(closure())
        except BaseException:
            with suppress(RuntimeError):  # weights that were modified are restored; that error is not the first
                self.restore_()
            self._second_gradient = False
            self.zero_grad()
            raise
        self._finish()
        self.zero_grad()
        return losses[0]

    def _finish(self) -> Any:
        assert self.base_optimizer is not None
        self._second_gradient = False
        self.restore_()
        return self.base_optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """That of the base optimizer; its groups have `rho` and `adaptive`."""
        assert self.base_optimizer is not None
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or the base optimizer's own, which leaves `rho` as it is.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        assert self.base_optimizer is not None
        if self._handles:
            raise RuntimeError("load_state_dict must not come between first_step and second_step")
        self.base_optimizer.load_state_dict(state_dict)
        self._adopt(self.base_optimizer)  # for bases whose own load_state_dict calls no hook

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self.base_optimizer!r}"


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.requires_grad and p.grad is not None]


def _check_rho(rho: object) -> None:
    value = _validate.number("rho", rho)
    if not 0 <= value < float("inf"):
        raise ValueError(f"rho must be finite and >= 0, got {value:g}")


def _check_base(base: object) -> None:
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base).__name__}")
    if taken := [name for name in _OWN if name in base.defaults]:
        raise ValueError(
            f"base_optimizer must have no option called {' or '.join(map(repr, taken))}, which is one of SAM's, "
            f"got {type(base).__name__}"
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"base_optimizer must be one whose step needs no closure, got {type(base).__name__}")

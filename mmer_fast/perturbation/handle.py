"""Parameters that are perturbed: the handle that knows their old bits, and gives them back whatever happens.

An interrupt may come between any two lines of Python. The operator is therefore called through C alone (`_run_once`),
so that whether it has run is never in doubt; and a handle that nobody restored restores when it goes away.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import filterfalse, starmap
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mmer_fast.ops import perturbation as operators
from mmer_fast.perturbation import sharded, stash, versions
from mmer_fast.perturbation.selection import Named


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
        parameters = [p for _, p in named]
        self._sharded = not all(map(is_, parameters, values))
        # A DTensor counts versions of its own, beside those of its local values.
        watched = parameters + values if self._sharded else values
        self._watched = list(filterfalse(Tensor.is_inference, watched))
        self._versions: list[int] | None = None
        self._number = 0
        self._module: nn.Module | None = None
        self._captured = False  # in a CUDA graph: nothing runs before it is replayed
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
        modified = self.restore_now()
        if modified:
            raise RuntimeError(modified_text(modified))

    def perturb_now(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Runs the operator on these gradients, norms and options; returns the norms and the factors."""
        results: list[tuple[Tensor, Tensor]] = []
        operator = operators.bare_operator("perturb_", self._backend)
        try:
            for record in self._records:
                record.perturbed = True
            self._active, self._captured = True, _is_captured(self._values)
            self._hooks = [*self._hooks, register_optimizer_step_post_hook(_count_fused_step)]
            _run_once(operator, (self._values, arguments[0], self._stash, *arguments[1:]), results)
            self._number = versions.next_number()
            self._versions = [t._version for t in self._watched]
            versions.write(self._watched, [self._number] * len(self._watched))
            torch.clear_autocast_cache()  # casts of the weights, which autocast keeps by their addresses
        except BaseException:
            self._active = bool(results)  # the stash is older than the weights unless the operator has run
            self.restore_now() if results else self._forget()
            raise
        return results[0]

    def restore_now(self) -> list[str]:
        """Restores; returns the names of parameters that others have changed in between."""
        modified = []
        if self._versions is not None and {t._version for t in self._watched} != {self._number}:
            modified = [name for name, p in self._named if not p.is_inference() and p._version != self._number]
        done: list[None] = []
        try:
            self._finish(done)
        except BaseException:  # an interrupt in the middle: first the weights, then the interrupt
            if self._active and self._captured:  # the capture has failed: the weights are the clean ones
                self._finish([None])
            elif self._active:
                self._finish(done)
            raise
        return modified

    def _finish(self, done: list[None]) -> None:
        if not done:
            if self._sharded:  # `module.to` gives a DTensor other local values, and a plain tensor other memory
                self._values = [sharded.local(p) for _, p in self._named]
            try:
                _run_once(operators.bare_operator("restore_", self._backend), (self._values, self._stash), done)
            except RuntimeError:
                if list(map(stash.kind, self._values)) == list(map(stash.kind, self._stash)):
                    raise
                self._restore_converted()
        if self._versions is not None:
            versions.write(self._watched, self._versions)
        torch.clear_autocast_cache()
        self._forget()

    def _restore_converted(self) -> None:
        """Restores what `module.to` has given another dtype or device, in its new one, and the shape of before."""
        with torch._C._AutoDispatchBelowADInplaceOrView():
            for value, kept in zip(self._values, self._stash, strict=True):
                if value.shape == kept.shape:
                    value.copy_(kept)
                else:
                    value.data = kept.clone()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for record in self._records:
            record.perturbed = False
        self._active = False
        if self._module is not None:
            sharded.drop_gathered(self._module)

    def guard(self, module: nn.Module) -> None:
        """While perturbed, state dicts of the module hold the clean weights; afterwards FSDP2 gathers them anew."""
        self._module = module
        hooks: list[Any] = []
        self._hooks = hooks
        perturbed = {id(parameter) for _, parameter in self._named}
        for owner in module.modules():
            if not perturbed.isdisjoint(map(id, owner._parameters.values())):
                hooks.append(owner.register_state_dict_post_hook(_save_clean_values))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Two that stand for the same weights would restore them twice, the first while the other counts on it."""
        if self._active:
            raise TypeError("a perturbation not restored cannot be copied or pickled: call its restore_() first")
        return super().__reduce_ex__(protocol)

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        for hook in self._hooks:
            hook.remove()
        if self._active:
            self.restore_now()
            warnings.warn(
                "a perturbation that nobody restored was restored because its handle went away: keep what perturb_ "
                "returns, and call its restore_()",
                ResourceWarning,
                stacklevel=2,
            )


def _run_once(operator: Any, arguments: tuple[Any, ...], results: list[Any]) -> None:
    """results.append(operator(*arguments)) without a moment in which an interrupt finds the one done, not the other."""
    with torch._C._AutoDispatchBelowADInplaceOrView():  # below autograd too: nothing is recorded
        results.extend(starmap(operator, (arguments,)))


def _count_fused_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Counts a version of perturbed parameters, which torch's fused optimizers change without counting one."""
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(list(filter(stash.is_perturbed, group["params"])))


def _is_captured(values: list[Tensor]) -> bool:
    """Whether what happens to these goes into a CUDA graph now."""
    return values[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _save_clean_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and prefix + name in state_dict:
            clean = stash.clean_values(parameter)
            if clean is not None:
                state_dict[prefix + name] = sharded.like(parameter, clean)


def modified_text(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"parameter {shown} was modified while perturbed; the weights of before the perturbation are back and that "
        "modification is lost. Put optimizer.step() and load_state_dict() after the block"
    )

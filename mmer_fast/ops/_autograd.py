"""An operator of the dispatcher with a derivative: registered for tracing, and as autograd.Functions for eager calls.

The formula is registered once for ``torch.compile``. In eager mode an autograd.Function of the same formula costs a
fraction of what the registered one does, and torch.func can differentiate no operator with a registered formula at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmer_fast.ops import _validate
from mmer_fast.ops._library import operator_of, qualified

Arguments = tuple[Any, ...]


class Differentiable:
    """The operator `name` with its derivative.

    Args:
        name: of an operator that is defined already.
        setup_context: ``(ctx, inputs, output)``, saves what the derivative needs.
        differentiate: ``(ctx, *gradients of the outputs) -> gradients of the inputs``.
        batch: makes the rule of vmap, ``(info, in_dims, *arguments) -> (outputs, out_dims)``, of what is to be called.
    """

    def __init__(
        self,
        name: str,
        setup_context: Callable[[Any, Arguments, Any], None],
        differentiate: Callable[..., Arguments],
        batch: Callable[[Any], Callable[..., tuple[Any, Any]]],
    ) -> None:
        self.operator = operator = operator_of(name)
        torch.library.register_autograd(qualified(name), differentiate, setup_context=setup_context)
        torch.library.register_vmap(qualified(name), batch(operator))
        rule = batch(self)  # of which a transform outside of this vmap sees the derivative

        class Eager(torch.autograd.Function):
            jvp = _refuses_forward_mode(name)

            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = _below_autograd(operator, arguments)
                setup_context(ctx, arguments, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Arguments:
                return differentiate(ctx, *grads)

        class Transformable(torch.autograd.Function):
            jvp = _refuses_forward_mode(name)

            @staticmethod
            def forward(*arguments: Any) -> Any:
                return operator(*arguments)

            @staticmethod
            def setup_context(ctx: Any, inputs: Arguments, output: Any) -> None:
                setup_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Arguments:
                return differentiate(ctx, *grads)

            @staticmethod
            def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
                return rule(info, in_dims, *arguments)

        self._eager, self._transformable = Eager, Transformable

    def __call__(self, *arguments: Any) -> Any:
        """Runs the operator, by the cheapest way that records what must be recorded."""
        if torch.compiler.is_compiling():
            return self.operator(*arguments)
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if not all(_validate.is_plain(x) for x in tensors):
            return self._transformable.apply(*arguments)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            # Inside a transform torch refuses a Function of the cheap kind, whatever its arguments.
            outside = torch._C._functorch.maybe_current_level() is None
            return (self._eager if outside else self._transformable).apply(*arguments)
        if forward_ad._current_level >= 0:  # a tangent does not show in requires_grad
            return self._transformable.apply(*arguments)
        return _below_autograd(self.operator, arguments)


def _refuses_forward_mode(name: str) -> Any:
    """The ``jvp`` of a Function that has none: it says which derivatives there are."""

    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name} has no forward-mode derivative, which torch.func.jvp, jacfwd and hessian and "
            "torch.autograd.forward_ad ask for; torch.func.vjp, grad and jacrev work, and jacrev of jacrev is the "
            "Hessian"
        )

    return staticmethod(jvp)


def _below_autograd(operator: Any, arguments: Arguments) -> Any:
    """Calls the kernel without the dispatcher's Python autograd kernel: there is nothing to record."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def one_by_one(operator: Any) -> Callable[..., tuple[Any, Any]]:
    """A rule of vmap: one call of `operator` for each mapped entry, whatever its arguments mean."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def entry(x: Any, dim: int | None, i: int) -> Any:
            if dim is None:
                return x
            return x.select(dim, i) if info.batch_size > 0 else x.new_zeros(x.movedim(dim, 0).shape[1:])

        calls = [  # one at least, which says what shapes there are none of
            operator(*(entry(x, dim, i) for x, dim in zip(args, in_dims, strict=True)))
            for i in range(max(info.batch_size, 1))
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls)[: info.batch_size], 0
        outputs = tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    return rule

"""The contestants: ours, what SAM's packages do, and what can be made of torch's foreach functions.

"clone and swap" does what davda54/sam does before and after the second pass, and for the scope "tensor" what codes of
adversarial training do; the foreach ones are what a user could write, with lists kept between cycles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmer_fast.bench import harness
from mmer_fast.bench.perturbation.cases import Problem
from mmer_fast.bench.perturbation.contestants import Contestant, Cycle, ours

CLONE_AND_SWAP = "clone and swap"
FRESH, KEPT, KEPT_ALPHA = "foreach, fresh copies", "foreach, kept copies", "foreach, kept copies, host norm"
ADD_SUB, COPY, PACKAGE = "foreach, add and subtract", "copy", "pytorch_optimizer SAM"


def clone_and_swap(problem: Problem) -> Cycle:
    """Tensor by tensor: norms, a clone of each weight, a step in temporaries; the clone then becomes the weight."""
    parameters, radius, adaptive = problem.parameters, problem.radius, problem.adaptive

    def factors() -> list[Tensor]:
        pairs = [(p.abs() if adaptive else 1.0, p.grad) for p in parameters if p.grad is not None]
        norms = [(weight * grad).norm(p=2) for weight, grad in pairs]
        if problem.scope == "tensor":
            return [radius / norm for norm in norms]
        return [radius / torch.stack(norms).norm(p=2)] * len(norms)

    @torch.no_grad()
    def perturb() -> list[Tensor]:
        old = []
        for p, factor in zip(parameters, factors(), strict=True):
            assert p.grad is not None
            old.append(p.data.clone())
            p.add_((p.square() if adaptive else 1.0) * p.grad * factor)
        return old

    def cycle(inside: Callable[[], object]) -> None:
        old = perturb()
        inside()
        for p, data in zip(parameters, old, strict=True):
            p.data = data

    return cycle


class _NoStep(torch.optim.Optimizer):
    """A base optimizer whose step costs nothing."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def package(problem: Problem) -> Cycle:
    """SAM of pytorch_optimizer, as it comes, around a base optimizer that does nothing."""
    from pytorch_optimizer import SAM

    sam = SAM(problem.parameters, _NoStep, rho=problem.radius, adaptive=problem.adaptive)

    def cycle(inside: Callable[[], object]) -> None:
        sam.first_step()
        inside()
        sam.second_step()

    return cycle


def _factor(problem: Problem, grads: list[Tensor]) -> Tensor:
    return problem.radius / torch.stack(torch._foreach_norm(grads)).norm()


def fresh_copies(problem: Problem) -> Cycle:
    """Copies in new memory, steps in temporaries, copies back into place."""
    parameters, grads = problem.parameters, problem.grads

    @torch.no_grad()
    def cycle(inside: Callable[[], object]) -> None:
        old = [p.clone() for p in parameters]
        torch._foreach_add_(parameters, torch._foreach_mul(grads, _factor(problem, grads)))
        inside()
        torch._foreach_copy_(parameters, old)

    return cycle


def kept_copies(host_norm: bool, problem: Problem) -> Cycle:
    """The copies in memory kept between cycles. `host_norm`: waits for the norm, and needs no temporaries then."""
    parameters, grads = problem.parameters, problem.grads
    stash = [torch.empty_like(p, requires_grad=False) for p in parameters]

    @torch.no_grad()
    def cycle(inside: Callable[[], object]) -> None:
        torch._foreach_copy_(stash, parameters)
        if host_norm:
            torch._foreach_add_(parameters, grads, alpha=float(_factor(problem, grads)))
        else:
            torch._foreach_add_(parameters, torch._foreach_mul(grads, _factor(problem, grads)))
        inside()
        torch._foreach_copy_(parameters, stash)

    return cycle


def add_and_subtract(problem: Problem) -> Cycle:
    """Nothing is kept: the step is taken back, but for the rounding."""
    parameters, grads = problem.parameters, problem.grads

    @torch.no_grad()
    def cycle(inside: Callable[[], object]) -> None:
        factor = float(_factor(problem, grads))
        torch._foreach_add_(parameters, grads, alpha=factor)
        inside()
        torch._foreach_sub_(parameters, grads, alpha=factor)

    return cycle


def copy(problem: Problem) -> Cycle:
    """One copy of all the weights' bytes."""
    source = torch.cat([p.detach().flatten() for p in problem.parameters])
    target = torch.empty_like(source)

    def cycle(inside: Callable[[], object]) -> None:
        target.copy_(source)

    return cycle


_ALL = ("global", "tensor")
CONTESTANTS = (
    *ours("cpu", "cpu"),
    *ours("cuda", "cuda"),
    *ours("triton", "cuda"),
    Contestant(COPY, copy, scopes=_ALL, adaptive=True, yardstick=True),
    Contestant(CLONE_AND_SWAP, clone_and_swap, scopes=_ALL, adaptive=True),
    Contestant(PACKAGE, package, adaptive=True, module="pytorch_optimizer", package="pytorch-optimizer"),
    Contestant(FRESH, fresh_copies),
    Contestant(KEPT, partial(kept_copies, False)),
    Contestant(KEPT_ALPHA, partial(kept_copies, True)),
    Contestant(ADD_SUB, add_and_subtract),
)


def select(device: str, names: list[str] | None = None) -> list[Contestant]:
    """The contestants of a device type; with `names`, those whose name contains one of them, and ours.

    Raises:
        ValueError: a name that fits no contestant.
    """
    pool = [contestant for contestant in CONTESTANTS if device in contestant.devices]
    mine = {c.name for c in pool if c.backend is not None}
    chosen = harness.select([c.name for c in pool], mine, {COPY}, names)
    return [contestant for contestant in pool if contestant.name in chosen]

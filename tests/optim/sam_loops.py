"""A small problem, and SAM as one writes it down: clone the weights, move them, copy them back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def small_batches(steps: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (steps, 16)
    x = torch.randn(*shape, 6, generator=generator).to(dtype)
    y = torch.randint(3, shape, generator=generator)
    return list(zip(x, y, strict=True))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: object, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """SAM's two calls for each batch; the losses of the first passes."""
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        optimizer.second_step(zero_grad=True)
        losses.append(loss.item())
    return losses


def reference_step(
    base: torch.optim.Optimizer,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    rho: float | Sequence[float],
    scope: str = "global",
    adaptive: bool = False,
) -> None:
    """One step of SAM with `base`, from the formulas; `rho` may be a number for each of the parameter groups."""
    radii = [rho] * len(base.param_groups) if isinstance(rho, float) else rho
    pairs = [
        (p, radius)
        for group, radius in zip(base.param_groups, radii, strict=True)
        for p in group["params"]
        if p.requires_grad
    ]
    params = [p for p, _ in pairs]
    grads = torch.autograd.grad(loss_of(model, batch), params)
    clean = [p.detach().clone() for p in params]
    measured = [w.abs() * g if adaptive else g for w, g in zip(clean, grads, strict=True)]
    total = torch.cat([u.flatten() for u in measured]).norm()
    with torch.no_grad():
        for (p, radius), w, g, u in zip(pairs, clean, grads, measured, strict=True):
            direction = w.square() * g if adaptive else g
            length = total if scope == "global" else u.norm()
            p.add_(direction * (radius * (w.norm() if scope == "awp" else 1) / length))
    base.zero_grad()
    loss_of(model, batch).backward()
    with torch.no_grad():
        for p, w in zip(params, clean, strict=True):
            p.copy_(w)
    base.step()
    base.zero_grad()


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(model: nn.Module, expected: Sequence[Tensor]) -> bool:
    """Whether all parameters are exactly `expected`."""
    return all(torch.equal(p, w) for p, w in zip(model.parameters(), expected, strict=True))


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer, **tolerance: float) -> None:
    """The states of two optimizers agree, parameter by parameter."""
    states_a, states_b = a.state_dict()["state"], b.state_dict()["state"]
    assert states_a.keys() == states_b.keys()
    for key, state in states_a.items():
        torch.testing.assert_close(state, states_b[key], **tolerance)

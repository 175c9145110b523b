"""A small model with every kind of parameter, and what the tests of perturbations ask about it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Model(nn.Module):
    """A tied weight, a frozen one, one without gradient, an empty one, and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.out = nn.Linear(6, 7)
        self.out.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.hidden[0].bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.hidden(self.embedding(tokens))) + self.empty.sum()


TOKENS, TARGETS = torch.tensor([0, 3, 3, 6]), torch.tensor([1, 2, 0, 5])
MOVED = ["embedding.weight", "hidden.0.weight", "hidden.1.weight", "hidden.1.bias", "out.bias"]


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS), TARGETS)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def moved(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]


def total(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors]).norm()

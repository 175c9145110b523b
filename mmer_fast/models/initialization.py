"""Initial weights."""

from __future__ import annotations

from torch import nn


def xavier_uniform_(module: nn.Module) -> None:
    """Draw every parameter of two or more dimensions (Glorot & Bengio 2010); biases and norms stay as they are."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)

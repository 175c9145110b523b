"""Checks that the configurations of this package share."""

from __future__ import annotations

from typing import Any

from mmer_fast.models.config import require


def require_sizes(config: object, *fields: str) -> None:
    """Fields of at least 1."""
    for field in fields:
        require(config, field, getattr(config, field) >= 1, "at least 1")


def require_rates(config: object, *fields: str) -> None:
    """Fields in [0, 1): dropout."""
    for field in fields:
        require(config, field, 0 <= getattr(config, field) < 1, "in [0, 1)")


def require_weights(config: object, *fields: str) -> None:
    """Fields of at least 0."""
    for field in fields:
        require(config, field, getattr(config, field) >= 0, "at least 0")


def require_heads(config: Any) -> None:
    """`heads`: at least 1, and a divisor of `dim`."""
    require_sizes(config, "heads")
    require(config, "heads", config.dim % config.heads == 0, f"a divisor of dim={config.dim}")

"""Feature vectors of three modalities that are linear maps of one latent vector, with noise or without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIZES = {"text": 12, "video": 8, "audio": 10}


@dataclass(frozen=True)
class LinearWorld:
    """The maps, so that samples can be drawn again and again."""

    maps: dict[str, Tensor]
    noise: float

    def draw(self, n: int) -> dict[str, Tensor]:
        """modality → (N, D) float64."""
        factors = next(iter(self.maps.values())).shape[0]
        latent = torch.randn(n, factors, dtype=torch.float64)
        return {
            name: latent @ mixing + self.noise * torch.randn(n, mixing.shape[1], dtype=torch.float64)
            for name, mixing in self.maps.items()
        }


def linear_world(factors: int = 6, noise: float = 0.0) -> LinearWorld:
    maps = {name: torch.randn(factors, size, dtype=torch.float64) for name, size in SIZES.items()}
    return LinearWorld(maps, noise)


def all_present(n: int) -> Tensor:
    return torch.ones(n, len(SIZES), dtype=torch.bool)

"""Imagination: from the embeddings of what is available to those of what is missing, and back.

Shape suffixes: r rows (samples under a condition), d width of the embeddings of all modalities, z width of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """φ: linear layers down to a code and up again; the plain imagination of the ablation MMIN-AE.

    Leaky ReLUs on the way down, ReLUs on the way up, none on the code or the result.

    Args:
        dim: width D of input and result.
        sizes: widths of the layers on the way down; the last is that of the code.
    """

    def __init__(self, dim: int, sizes: Sequence[int]) -> None:
        super().__init__()
        widths = [dim, *sizes]
        self.code_dim = widths[-1]
        self.encoder = _stack(widths, nn.LeakyReLU)
        self.decoder = _stack(widths[::-1], nn.ReLU)

    def forward(self, h_rd: Tensor) -> tuple[Tensor, Tensor]:
        """φ(h) (R, D) of h (R, D), and the code (R, Z)."""
        code_rz = self.encoder(h_rd)
        return self.decoder(code_rz), code_rz


class CascadeResidualAutoencoder(nn.Module):
    """CRA: B autoencoders, each of which adds to what the ones before it have made of h (the talk; Tran et al., 2017).

        Δz_1 = φ_1(h),   Δz_k = φ_k(h + Σ_{j<k} Δz_j),   h' = h + Σ_k Δz_k

    Args:
        dim: width D of input and result.
        sizes: as in `Autoencoder`, of every block.
        blocks: B.
        transition: two linear layers with a ReLU between them make the result of the sum, as in the published code.
    """

    def __init__(self, dim: int, sizes: Sequence[int], blocks: int = 5, transition: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Autoencoder(dim, sizes) for _ in range(blocks))
        self.transition = _stack([dim] * 3, nn.ReLU) if transition else nn.Identity()
        self.code_dim = blocks * sizes[-1]

    def forward(self, h_rd: Tensor) -> tuple[Tensor, Tensor]:
        """h' (R, D) of h (R, D), and the codes of all blocks side by side, (R, B Z)."""
        codes = []
        for block in self.blocks:
            delta_rd, code_rz = block(h_rd)
            h_rd = h_rd + delta_rd
            codes.append(code_rz)
        return self.transition(h_rd), torch.cat(codes, dim=1)


class Imagined(NamedTuple):
    """What comes of embeddings h.

    Attributes:
        forward: (R, D), h' = imagine_forward(h), of what was missing.
        backward: (R, D), h'' = imagine_backward(h'), of what was available; None without a cycle.
        joint: (R, Z), the codes of the forward imagination: the joint representation that is classified.
    """

    forward: Tensor
    backward: Tensor | None
    joint: Tensor


class Imagination(nn.Module):
    """Forward imagination and, for cycle consistency, its way back, a network of the same make.

    Args:
        forward_network: `Autoencoder` or `CascadeResidualAutoencoder`.
        backward_network: the same; None for no cycle.
    """

    def __init__(
        self,
        forward_network: Autoencoder | CascadeResidualAutoencoder,
        backward_network: Autoencoder | CascadeResidualAutoencoder | None,
    ) -> None:
        super().__init__()
        self.forward_network = forward_network
        self.backward_network = backward_network

    def forward(self, h_rd: Tensor) -> Imagined:
        """Imagine from h (R, D)."""
        forward_rd, joint_rz = self.forward_network(h_rd)
        backward_rd = None if self.backward_network is None else self.backward_network(forward_rd)[0]
        return Imagined(forward_rd, backward_rd, joint_rz)

    def joint(self, h_rd: Tensor) -> Tensor:
        """The joint representation (R, Z) alone."""
        return self.forward_network(h_rd)[1]


def _stack(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers through these widths, activations between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])

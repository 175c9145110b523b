"""Cascade, cycle and losses against the talk's equations written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmer_fast.systems.mmin import Autoencoder, CascadeResidualAutoencoder, Imagination, imagination_loss


def linear(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return torch.stack([(row * x).sum() for row in layer.weight]) + layer.bias


def autoencode(block: Autoencoder, h: Tensor) -> tuple[Tensor, Tensor]:
    """φ(h) and the code of one sample: linear layers 0, 2, 4 on either side of the code."""
    for i in (0, 2, 4):
        h = linear(block.encoder[i], h)
        h = torch.where(h > 0, h, 0.01 * h) if i < 4 else h
    code = h
    for i in (0, 2, 4):
        h = linear(block.decoder[i], h)
        h = h.clamp(min=0) if i < 4 else h
    return h, code


@pytest.mark.parametrize("transition", [False, True])
def test_cascade_is_the_equation_of_the_talk(transition: bool) -> None:
    cascade = CascadeResidualAutoencoder(6, (8, 4, 2), blocks=3, transition=transition).double()
    h_rd = torch.randn(4, 6, dtype=torch.float64)
    imagined, codes = cascade(h_rd)
    for r in range(4):
        deltas, latent = [], []
        for block in cascade.blocks:
            delta, code = autoencode(block, h_rd[r] + sum(deltas))
            deltas.append(delta)
            latent.append(code)
        expected = h_rd[r] + sum(deltas)
        if transition:
            expected = linear(cascade.transition[2], linear(cascade.transition[0], expected).clamp(min=0))
        torch.testing.assert_close(imagined[r], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(codes[r], torch.cat(latent), rtol=1e-10, atol=1e-12)
    assert codes.shape[1] == cascade.code_dim == 6


def test_plain_autoencoder_has_no_residual() -> None:
    network = Autoencoder(6, (8, 4, 2)).double()
    h_rd = torch.randn(2, 6, dtype=torch.float64)
    imagined, codes = network(h_rd)
    expected, code = autoencode(network, h_rd[1])
    torch.testing.assert_close(imagined[1], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(codes[1], code, rtol=1e-10, atol=1e-12)


def test_backward_imagination_starts_from_the_forward_one() -> None:
    first, second = (CascadeResidualAutoencoder(6, (8, 4, 2), blocks=2).double() for _ in range(2))
    h_rd = torch.randn(3, 6, dtype=torch.float64)
    imagined = Imagination(first, second)(h_rd)
    torch.testing.assert_close(imagined.forward, first(h_rd)[0])
    torch.testing.assert_close(imagined.backward, second(first(h_rd)[0])[0])
    torch.testing.assert_close(imagined.joint, first(h_rd)[1])
    assert Imagination(first, None)(h_rd).backward is None


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_imagination_loss_is_a_mean_of_squared_norms(reduction: str) -> None:
    target, imagined = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = 0.0
    for row, other in zip(target.tolist(), imagined.tolist(), strict=True):
        norm = sum((a - b) ** 2 for a, b in zip(row, other, strict=True))
        expected += norm / 4 / (3 if reduction == "mean" else 1)
    assert imagination_loss(target, imagined, reduction).item() == pytest.approx(expected, rel=1e-12)
    assert imagination_loss(target[:0], imagined[:0], reduction).item() == 0


def test_gradients_of_the_cascade() -> None:
    cascade = CascadeResidualAutoencoder(3, (4, 2, 2), blocks=2, transition=True).double()
    h_rd = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cascade, (h_rd,))

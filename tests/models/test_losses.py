"""Losses against sums written out in float64."""

from __future__ import annotations

import math

import torch

from mmer_fast import softmax_kl_with_logits
from mmer_fast.models.losses import asymmetric_loss, binary_cross_entropy

LOGITS = torch.tensor([[0.3, -2.0, 4.0], [1.5, 0.0, -6.0]], dtype=torch.float64)
OTHER = torch.tensor([[1.3, -1.0, 3.0], [-0.5, 0.2, -7.0]], dtype=torch.float64)
LABELS = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def entries(*tensors: torch.Tensor) -> list[tuple[float, ...]]:
    return list(zip(*(t.flatten().tolist() for t in tensors), strict=True))


def test_binary_cross_entropy_is_eq_2_and_3() -> None:
    terms = [y * math.log(sigmoid(x)) + (1 - y) * math.log(1 - sigmoid(x)) for x, y in entries(LOGITS, LABELS)]
    torch.testing.assert_close(binary_cross_entropy(LOGITS, LABELS).item(), -sum(terms) / 6, rtol=1e-12, atol=0)


def test_asymmetric_loss_is_the_authors() -> None:
    total = 0.0
    for x, y in entries(LOGITS, LABELS):
        p, q = sigmoid(x), min(1 - sigmoid(x) + 0.05, 1.0)
        if y:
            total += (1 - p) ** 1 * math.log(max(p, 1e-5))
        else:
            total += (1 - q) ** 2 * math.log(max(q, 1e-5))
    expected = -1000 * total / 6
    torch.testing.assert_close(asymmetric_loss(LOGITS, LABELS).item(), expected, rtol=1e-12, atol=0)


def test_asymmetric_loss_stops_at_the_logarithm_of_eps() -> None:
    logits, labels = torch.tensor([[-20.0]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    expected = -1000 * (1 - sigmoid(-20.0)) * math.log(1e-5)
    torch.testing.assert_close(asymmetric_loss(logits, labels).item(), expected, rtol=1e-12, atol=0)


def test_the_gradient_of_the_asymmetric_loss_passes_through_its_weights() -> None:
    assert torch.autograd.gradcheck(lambda logits: asymmetric_loss(logits, LABELS), OTHER.clone().requires_grad_())


def test_asymmetric_loss_has_finite_gradients_at_extreme_logits() -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0, 200.0]], requires_grad=True)
    asymmetric_loss(logits, torch.tensor([[1.0, 0.0, 1.0, 0.0]])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_authors_consistency_gradient_is_tiny_beside_their_recognition_gradient() -> None:
    logits = OTHER.clone().requires_grad_()
    (consistency,) = torch.autograd.grad(softmax_kl_with_logits(LOGITS, logits), logits)
    (recognition,) = torch.autograd.grad(asymmetric_loss(logits, LABELS), logits)
    assert consistency.norm() < 1e-3 * recognition.norm()

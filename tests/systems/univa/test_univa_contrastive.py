"""UniVA's contrastive loss against its sums written out, and how much it holds at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmer_fast.systems.univa import va_contrastive_loss


def made(samples: int = 11, width: int = 5, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(samples, width, dtype=torch.float64, generator=generator)
    return features, spread * torch.rand(samples, 2, dtype=torch.float64, generator=generator)


def slides(anchors: Tensor, va: Tensor, others: Tensor, others_va: Tensor, same: bool, tau: float) -> list[float]:
    """L_i of the slides, of directions; `same`: the others are the anchors, of which each leaves itself out."""
    losses = []
    for i, h in enumerate(anchors):
        compared = [j for j in range(len(others)) if not (same and j == i)]
        scores = {j: float(h / h.norm() @ others[j] / others[j].norm()) / tau for j in compared}
        close = [j for j in compared if math.dist(va[i].tolist(), others_va[j].tolist()) < 0.1]
        total = sum(math.exp(s) for s in scores.values())
        losses.append(-sum(math.log(math.exp(scores[j]) / total) for j in close) / len(close) if close else 0.0)
    return losses


def published(features: Tensor, va: Tensor, tau: float) -> float:
    """Two identical views end to end; the anchor's place in the first one is left out of everything."""
    n, losses = len(features), []
    for i in range(n):
        scores = {j: float(features[i] @ features[j % n]) / tau for j in range(2 * n) if j != i}
        close = [j for j in scores if math.dist(va[i].tolist(), va[j % n].tolist()) < 0.1 or j == n + i]
        total = sum(math.exp(s) for s in scores.values())
        losses.append(-sum(scores[j] - math.log(total) for j in close) / len(close))
    return sum(losses) / n


@pytest.mark.parametrize("block_rows", [1, 4, 11, 256])
def test_slides(block_rows: int) -> None:
    features, va = made()
    expected = slides(features, va, features, va, True, 0.7)
    assert min(expected) == 0 < max(expected)  # anchors without a positive, and with
    got = va_contrastive_loss(features, va, reduction="none", block_rows=block_rows)
    assert got.tolist() == pytest.approx(expected, rel=1e-12)
    total = va_contrastive_loss(features, va, block_rows=block_rows)
    assert total.item() == pytest.approx(sum(expected), rel=1e-12)
    mean = va_contrastive_loss(features, va, reduction="mean", block_rows=block_rows)
    assert mean.item() == pytest.approx(sum(expected) / sum(x > 0 for x in expected), rel=1e-12)


def test_samples_at_the_distance_are_no_positives() -> None:
    features = torch.randn(3, 5, dtype=torch.float64)
    va = torch.tensor([[0.0, 0.0], [0.25, 0.0], [0.25, 0.25]])
    assert va_contrastive_loss(features, va, distance=0.25, reduction="none").tolist() == [0, 0, 0]
    assert va_contrastive_loss(features, va, distance=0.26, reduction="none").all()


@pytest.mark.parametrize("block_rows", [3, 256])
def test_published_code(block_rows: int) -> None:
    features, va = made()
    options: dict[str, Any] = {"normalize": False, "views": 2, "reduction": "mean", "block_rows": block_rows}
    got = va_contrastive_loss(features, va, temperature=0.4, **options)
    assert got.item() == pytest.approx(published(features, va, 0.4), rel=1e-12)


def test_against_other_samples() -> None:
    (features, va), (others, others_va) = made(4), made(9)
    expected = slides(features, va, others, others_va, False, 0.5)
    got = va_contrastive_loss(features, va, others, others_va, temperature=0.5, reduction="none", block_rows=3)
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients(views: Any, normalize: bool) -> None:
    features, va = made()
    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def loss(features: Tensor, temperature: Tensor) -> Tensor:
        options: dict[str, Any] = {"normalize": normalize, "views": views, "reduction": "none", "block_rows": 4}
        return va_contrastive_loss(features, va, temperature=temperature, **options)

    assert torch.autograd.gradcheck(loss, (features.requires_grad_(), temperature))


def test_gradients_of_both_sides() -> None:
    (features, va), (others, others_va) = made(5), made(9)

    def loss(features: Tensor, others: Tensor) -> Tensor:
        return va_contrastive_loss(features, va, others, others_va, block_rows=2, reduction="mean")

    assert torch.autograd.gradcheck(loss, (features.requires_grad_(), others.requires_grad_()))


@pytest.mark.parametrize("samples", [0, 1])
def test_too_few_samples_for_a_pair(samples: int) -> None:
    features, va = made(samples)
    for reduction in ("sum", "mean"):
        features.grad = None
        loss = va_contrastive_loss(features.requires_grad_(), va, reduction=reduction)  # type: ignore[arg-type]
        loss.backward()
        assert loss.item() == 0
        assert features.grad is not None
        assert not features.grad.any()


def test_no_positives_at_all_and_scores_that_are_not_numbers() -> None:
    features, va = made()
    for scores in (va * 1000, va * torch.nan):
        features.grad = None
        loss = va_contrastive_loss(features.requires_grad_(), scores)
        loss.backward()
        assert loss.item() == 0
        assert features.grad is not None
        assert not features.grad.any()


def test_large_scores_do_not_overflow() -> None:
    features, va = made()
    features = (1000 * features).float().requires_grad_()
    va_contrastive_loss(features, va.float(), normalize=False, views=2).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_half_types_and_autocast_compute_in_float32() -> None:
    features, va = made()
    half = features.bfloat16()
    expected = va_contrastive_loss(half.float(), va)
    assert va_contrastive_loss(half, va).item() == expected.item()
    single = half.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = va_contrastive_loss(single, va)
        loss.backward()
    assert loss.item() == expected.item()
    (wanted,) = torch.autograd.grad(va_contrastive_loss(single, va), single)
    assert torch.equal(single.grad, wanted)  # type: ignore[arg-type]


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation has returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return out


def test_no_matrix_of_all_pairs_is_ever_held() -> None:
    samples, width, block_rows = 300, 7, 10
    features, va = made(samples, width)
    kept = 0

    def keep(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        va_contrastive_loss(features.requires_grad_(), va, block_rows=block_rows).backward()
    assert largest.numel == max(block_rows * samples, samples * width)
    assert kept < 10 * samples * width


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.ones(3)}, ValueError, r"features must have shape \(B, D\), got \(3,\)"),
        ({"features": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "features must be float32"),
        ({"va": torch.ones(4, 2)}, ValueError, r"va must have shape \(3, 2\), got \(4, 2\)"),
        ({"contrast": torch.ones(3, 2)}, ValueError, "given together, got one of them"),
        (
            {"contrast": torch.ones(5, 3), "contrast_va": torch.ones(5, 2)},
            ValueError,
            "contrast must have the width 2 of features, got 3",
        ),
        (
            {"contrast": torch.ones(5, 2), "contrast_va": torch.ones(5, 2), "views": 2},
            ValueError,
            "views must be 1, or 2 without contrast, got 2",
        ),
        ({"views": 3}, ValueError, "views must be 1, or 2 without contrast, got 3"),
        ({"reduction": "max"}, ValueError, "reduction must be one of sum, mean, none, got 'max'"),
        ({"temperature": 0}, ValueError, "temperature must be finite and > 0, got 0"),
        ({"distance": -1}, ValueError, "distance must be within"),
        ({"block_rows": 0}, ValueError, "block_rows must be at least 1, got 0"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"features": torch.ones(3, 2), "va": torch.ones(3, 2)} | changes
    with pytest.raises(error, match=message):
        va_contrastive_loss(**arguments)

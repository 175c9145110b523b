"""Distances between distributions against sums over pairs and moments written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmer_fast.systems.adaptation import cross_modal_matching, maximum_mean_discrepancy, moment_discrepancy

DISTANCES = [maximum_mean_discrepancy, moment_discrepancy]
X = [[0.1, -0.3], [0.5, 0.2], [-0.4, 0.0]]
Y = [[0.2, 0.6], [-0.7, 0.1]]


def double(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def squared(a: list[float], b: list[float]) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def test_mmd_is_its_three_means_of_kernels() -> None:
    weighted = [(row, 1 / 6) for row in X] + [(row, 1 / 4) for row in Y]
    variance = sum(u * v * squared(a, b) for a, u in weighted for b, v in weighted)

    def mean_kernel(first: list[list[float]], second: list[list[float]]) -> float:
        values = [math.exp(-squared(a, b) / (s * variance)) / 3 for a in first for b in second for s in (0.5, 1, 2)]
        return sum(values) / (len(first) * len(second))

    expected = mean_kernel(X, X) + mean_kernel(Y, Y) - 2 * mean_kernel(X, Y)
    assert maximum_mean_discrepancy(double(X), double(Y)).item() == pytest.approx(expected, rel=1e-12)


def test_moment_discrepancy_is_its_differences_of_moments() -> None:
    def moments(rows: list[list[float]], k: int) -> list[float]:
        means = [sum(row[d] for row in rows) / len(rows) for d in range(2)]
        if k == 1:
            return means
        return [sum((row[d] - means[d]) ** k for row in rows) / len(rows) for d in range(2)]

    expected = sum(math.sqrt(squared(moments(X, k), moments(Y, k))) / 2**k for k in (1, 2, 3))
    assert moment_discrepancy(double(X), double(Y), moments=3).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_samples_that_do_not_count_are_left_out(distance: Callable[..., Tensor]) -> None:
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    x_valid = torch.tensor([True, False, True, True, False, True])
    y_valid = torch.tensor([False, True, True, False, True])
    expected = distance(x[x_valid], y[y_valid])
    poisoned = x.masked_fill(~x_valid[:, None], math.nan).requires_grad_()
    found = distance(poisoned, y, x_valid, y_valid)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert expected > 0
    assert poisoned.grad is not None
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[~x_valid] == 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_distributions_are_at_distance_0_with_a_gradient_of_0(distance: Callable[..., Tensor]) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert abs(distance(x, x.detach()[[2, 0, 3, 1]]).item()) < 1e-14
    distance(x, x.detach()).backward()
    assert x.grad is not None
    assert x.grad.norm() < 1e-14


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("empty", [0, 1])
def test_nothing_is_at_distance_0(distance: Callable[..., Tensor], empty: int) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    nobody = torch.zeros(4, dtype=torch.bool)
    masks = (nobody, None) if empty == 0 else (None, nobody)
    found = distance(x, x.detach() + 1, *masks)
    found.backward()
    assert found.item() == 0
    assert x.grad is not None
    assert (x.grad == 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_one_sample_each_and_all_the_same(distance: Callable[..., Tensor]) -> None:
    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    distance(x, torch.zeros(1, 3, dtype=torch.float64)).backward()
    assert x.grad is not None
    assert (x.grad == 0).all()
    assert distance(x, torch.ones(1, 3, dtype=torch.float64)) > 0


def test_gradients() -> None:
    x, y = torch.randn(4, 2, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: moment_discrepancy(x, y), (x,))
    # The variance has no gradient, so the difference quotient is that of the kernels at this variance.
    both = torch.cat([x, y]).detach()
    weights = torch.tensor([1 / 8] * 4 + [1 / 6] * 3, dtype=torch.float64)
    variance = weights @ (both[:, None] - both).square().sum(2) @ weights

    def fixed(x: Tensor) -> Tensor:
        def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
            return (-(a[:, None] - b).square().sum(2) / variance).exp().mean()

        return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)

    (expected,) = torch.autograd.grad(fixed(x), x)
    (found,) = torch.autograd.grad(maximum_mean_discrepancy(x, y, bandwidths=[1.0]), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("distance", DISTANCES)
def test_cross_modal_matching_is_the_mean_over_pairs(distance: Callable[..., Tensor]) -> None:
    embeddings = torch.randn(6, 3, 2, dtype=torch.float64)
    present = torch.rand(6, 3) > 0.3
    present[:, 1] = False
    present[0, 1] = True
    chosen = [embeddings[present[:, i], i] for i in range(3)]
    expected = (distance(chosen[0], chosen[1]) + distance(chosen[0], chosen[2]) + distance(chosen[1], chosen[2])) / 3
    torch.testing.assert_close(cross_modal_matching(embeddings, present, distance), expected, rtol=1e-12, atol=1e-14)
    assert cross_modal_matching(embeddings[:, :1], present[:, :1], distance) == 0


def test_minimising_mmd_moves_one_distribution_onto_the_other() -> None:
    y = torch.randn(64, 2) + torch.tensor([3.0, -1.0])
    x = torch.randn(64, 2).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    first = maximum_mean_discrepancy(x, y).item()
    for _ in range(100):
        optimizer.zero_grad()
        maximum_mean_discrepancy(x, y).backward()
        optimizer.step()
    assert maximum_mean_discrepancy(x, y).item() < 0.05 * first
    assert (x.mean(dim=0) - y.mean(dim=0)).norm() < 1

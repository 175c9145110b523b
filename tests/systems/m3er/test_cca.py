"""Canonical correlation analysis against scikit-learn's, and what the mathematics promises."""

from __future__ import annotations

import pytest
import torch
from sklearn.cross_decomposition import CCA
from torch import Tensor

from mmer_fast.systems.m3er import CanonicalCorrelations, canonical_correlations


def related(n: int = 200, p: int = 7, q: int = 5, shared: int = 3) -> tuple[Tensor, Tensor]:
    """Two sets of features that show the same latent numbers under noise, on scales of their own."""
    latent = torch.randn(n, shared, dtype=torch.float64) * torch.linspace(1.0, 2.0, shared, dtype=torch.float64)
    x = latent @ torch.randn(shared, p, dtype=torch.float64) + torch.randn(n, p, dtype=torch.float64)
    y = latent @ torch.randn(shared, q, dtype=torch.float64) + torch.randn(n, q, dtype=torch.float64)
    return 100 * x + 3, 0.01 * y - 1


def variates(fitted: CanonicalCorrelations, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (x - fitted.x_mean) @ fitted.x_map.T, (y - fitted.y_mean) @ fitted.y_map.T


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """Of the columns of a with those of b, (C, C)."""
    both = torch.corrcoef(torch.cat([a, b], dim=1).T)
    return both[: a.shape[1], a.shape[1] :]


def test_correlations_and_projections_are_those_of_scikit_learn() -> None:
    x, y = related()
    fitted = canonical_correlations(x, y, components=4)
    theirs_x, theirs_y = CCA(n_components=4, max_iter=100_000, tol=1e-14).fit_transform(x.numpy(), y.numpy())
    theirs_x, theirs_y = torch.from_numpy(theirs_x), torch.from_numpy(theirs_y)
    expected = correlations(theirs_x, theirs_y).diagonal()
    torch.testing.assert_close(fitted.correlations, expected, rtol=1e-7, atol=1e-7)
    for ours, theirs in zip(variates(fitted, x, y), (theirs_x, theirs_y), strict=True):
        same = correlations(ours, theirs).diagonal().abs()
        torch.testing.assert_close(same, torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_components_have_variance_one_and_the_correlations_that_are_given(ridge: float) -> None:
    x, y = related()
    fitted = canonical_correlations(x, y, components=5, ridge=ridge)
    a, b = variates(fitted, x, y)
    torch.testing.assert_close(torch.var(a, dim=0), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(torch.var(b, dim=0), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(correlations(a, b).diagonal(), fitted.correlations)
    torch.testing.assert_close(a.mean(dim=0), torch.zeros(5, dtype=torch.float64))


def test_a_ridge_adds_a_share_of_its_own_variance_to_every_feature() -> None:
    """The maps against the eigenvectors of (S_xx + r D_x)⁻¹ S_xy (S_yy + r D_y)⁻¹ S_yx."""
    x, y = related()
    fitted = canonical_correlations(x, y, components=3, ridge=0.3)
    covariances = torch.cov(torch.cat([x, y], dim=1).T)
    s_xx, s_xy, s_yy = covariances[:7, :7], covariances[:7, 7:], covariances[7:, 7:]
    r_x, r_y = (s + 0.3 * s.diagonal().diag() for s in (s_xx, s_yy))
    values, vectors = torch.linalg.eig(torch.linalg.solve(r_x, s_xy) @ torch.linalg.solve(r_y, s_xy.T))
    leading = vectors.real[:, values.real.argsort(descending=True)[:3]]
    cosines = torch.cosine_similarity(fitted.x_map, leading.T, dim=1)
    torch.testing.assert_close(cosines.abs(), torch.ones(3, dtype=torch.float64))


def test_without_a_ridge_different_components_are_uncorrelated() -> None:
    x, y = related()
    fitted = canonical_correlations(x, y, components=5)
    a, b = variates(fitted, x, y)
    torch.testing.assert_close(correlations(a, b), torch.diag(fitted.correlations), rtol=0, atol=1e-10)
    assert (fitted.correlations.diff() <= 0).all()


def test_linear_maps_of_the_features_change_no_correlation() -> None:
    x, y = related()
    turned = canonical_correlations(x @ torch.randn(7, 7, dtype=torch.float64) + 5, y, components=5)
    torch.testing.assert_close(turned.correlations, canonical_correlations(x, y, components=5).correlations)


def test_dependent_and_constant_features_do_no_harm() -> None:
    x, y = related()
    more = torch.cat([x, x[:, :3] @ torch.randn(3, 2, dtype=torch.float64), torch.full((200, 1), 0.1)], dim=1)
    fitted = canonical_correlations(more, y, components=100)
    expected = canonical_correlations(x, y, components=100)
    assert fitted.x_map.shape == (5, 10)
    torch.testing.assert_close(fitted.correlations, expected.correlations)


def test_the_rank_limits_the_components() -> None:
    x, y = related(n=4)
    fitted = canonical_correlations(x, y, components=100)
    assert fitted.x_map.shape == (3, 7)  # four centred samples span three dimensions, in which all correlates
    torch.testing.assert_close(fitted.correlations, torch.ones(3, dtype=torch.float64))
    constant = canonical_correlations(torch.full((9, 2), 0.3), related(n=9)[1], components=3)
    assert constant.x_map.shape == (0, 2)
    assert constant.y_map.shape == (0, 5)


def test_a_ridge_generalises_where_samples_are_few() -> None:
    x, y = related(n=1040, p=30, q=30)
    held_out = []
    for ridge in (0.0, 1.0):
        fitted = canonical_correlations(x[:40], y[:40], components=3, ridge=ridge)
        held_out.append(correlations(*variates(fitted, x[40:], y[40:])).diagonal().mean())
    assert held_out[1] > held_out[0] + 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_np": torch.randn(200)}, r"x must be floating of shape \(N >= 2, features\), got torch.float32"),
        ({"y_nq": torch.ones(200, 5, dtype=torch.int64)}, "y must be floating"),
        ({"x_np": torch.randn(1, 7), "y_nq": torch.randn(1, 5)}, "x must be floating"),
        ({"x_np": torch.randn(199, 7)}, "as many samples as each other, got 199 and 200"),
        ({"x_np": torch.full((200, 7), torch.nan)}, "x must hold finite values, got 1400 others"),
        ({"components": 0}, "components must be at least 1, got 0"),
        ({"ridge": -1.0}, "ridge must be at least 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    x, y = related()
    with pytest.raises(ValueError, match=message):
        canonical_correlations(**{"x_np": x, "y_nq": y, "components": 3, **change})

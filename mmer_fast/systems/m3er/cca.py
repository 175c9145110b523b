"""Canonical correlation analysis in closed form, by singular value decompositions in float64.

The pairs of directions in which two sets of features vary together most (Hotelling 1936). With the thin SVDs of the
centred data X = U_x S_x V_xᵀ and Y = U_y S_y V_yᵀ, the canonical correlations are the singular values of U_xᵀ U_y
(Björck and Golub 1973): no covariance matrix is inverted, and features that depend on each other do no harm.

Shape suffixes: n samples, p and q features, c components.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CanonicalCorrelations(NamedTuple):
    """Two linear maps to as many components each: H (x − mean), of mean 0 and variance 1 on the data of the fit.

    Attributes:
        x_mean: (p,); y_mean: (q,).
        x_map: (C, p), H of x; y_map: (C, q), H of y.
        correlations: (C,) between the components of x and y on the data of the fit, falling.

    All float64.
    """

    x_mean: Tensor
    y_mean: Tensor
    x_map: Tensor
    y_map: Tensor
    correlations: Tensor


def canonical_correlations(x_np: Tensor, y_nq: Tensor, components: int, ridge: float = 0.0) -> CanonicalCorrelations:
    """Fit a canonical correlation analysis.

    Args:
        x_np, y_nq: (N, p) and (N, q) floating, the same samples in both; computed in float64.
        components: C at most; fewer where the rank of x or y is lower.
        ridge: r ≥ 0, added to the variance of each feature in units of that variance. The directions of the
            plain analysis (0) fit the noise where there are not many more samples than features.

    Raises:
        ValueError: an argument has the wrong shape or range, N is below 2, or a value is not finite.
    """
    _check(x_np, y_nq, components, ridge)
    x_basis_nr, x_back_pr = _whitened(x_np.double(), ridge)
    y_basis_ns, y_back_qs = _whitened(y_nq.double(), ridge)
    left_rk, _, right_ks = torch.linalg.svd(x_basis_nr.T @ y_basis_ns, full_matrices=False)
    components = min(components, left_rk.shape[1])
    left_rc, right_sc = left_rk[:, :components], right_ks[:components].T
    x_nc, y_nc = x_basis_nr @ left_rc, y_basis_ns @ right_sc
    x_norm_c, y_norm_c = x_nc.norm(dim=0), y_nc.norm(dim=0)
    unit = (len(x_np) - 1) ** 0.5
    return CanonicalCorrelations(
        x_mean=x_np.double().mean(dim=0),
        y_mean=y_nq.double().mean(dim=0),
        x_map=(x_back_pr @ left_rc * (unit / x_norm_c)).T,
        y_map=(y_back_qs @ right_sc * (unit / y_norm_c)).T,
        correlations=(x_nc * y_nc).sum(dim=0) / (x_norm_c * y_norm_c),
    )


def _whitened(x_np: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """A basis (N, R) of the centred columns, orthonormal without a ridge, and the map (p, R) that gives it."""
    centred_np = x_np - x_np.mean(dim=0)
    norm_p = centred_np.norm(dim=0)
    varies_p = norm_p > norm_p.new_tensor(torch.finfo(norm_p.dtype).eps) * x_np.norm(dim=0)
    per_norm_p = torch.where(varies_p, 1 / norm_p.masked_fill(~varies_p, 1.0), 0.0)
    left_nr, singular_r, right_rp = torch.linalg.svd(centred_np * per_norm_p, full_matrices=False)
    smallest = torch.finfo(singular_r.dtype).eps * max(x_np.shape) * singular_r.max()
    rank = int((singular_r > smallest).sum())
    left_nr, singular_r, right_rp = left_nr[:, :rank], singular_r[:rank], right_rp[:rank]
    damped_r = (singular_r**2 + ridge).sqrt()
    return left_nr * (singular_r / damped_r), per_norm_p[:, None] * right_rp.T / damped_r


def _check(x_np: Tensor, y_nq: Tensor, components: int, ridge: float) -> None:
    for name, value in (("x", x_np), ("y", y_nq)):
        if value.dim() != 2 or not value.is_floating_point() or len(value) < 2:
            raise ValueError(
                f"{name} must be floating of shape (N >= 2, features), got {value.dtype} of shape {tuple(value.shape)}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{name} must hold finite values, got {int((~value.isfinite()).sum())} others")
    if len(x_np) != len(y_nq):
        raise ValueError(f"x and y must have as many samples as each other, got {len(x_np)} and {len(y_nq)}")
    if components < 1:
        raise ValueError(f"components must be at least 1, got {components}")
    if not ridge >= 0:
        raise ValueError(f"ridge must be at least 0, got {ridge}")

"""The modality check step of M3ER: which modalities of a sample carry signal, judged by their agreement.

For each pair of modalities (i, j) canonical correlation analysis of the training data gives H_ij^i and H_ij^j:

    f'_i = H_ij^i f_i        f'_j = H_ij^j f_j        ρ(f'_i, f'_j) = cov(f'_i, f'_j) / (σ_f'_i σ_f'_j)

with covariance and deviations over the components of the two vectors of one sample. Modality i is ineffectual,
I_e(f_i) = 0, where ρ < τ (Eq. 1 of the paper).

Shapes: N training samples, B samples, M modalities, P = M (M − 1) / 2 pairs, D features, C components.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

from mmer_fast.systems.m3er.cca import canonical_correlations
from mmer_fast.systems.m3er.fitted import FittedModule

MIN_COMPONENTS = 2  # of vectors that can be correlated


def component_correlation(a_bc: Tensor, b_bc: Tensor) -> Tensor:
    """ρ (B,): Pearson's correlation of two vectors (B, C) over their components.

    NaN with fewer than two components, or where a vector's components are all equal.
    """
    if a_bc.shape[1] < MIN_COMPONENTS:
        return a_bc.new_full(a_bc.shape[:1], torch.nan)
    a_bc = a_bc - a_bc.mean(dim=1, keepdim=True)
    b_bc = b_bc - b_bc.mean(dim=1, keepdim=True)
    return (a_bc * b_bc).sum(dim=1) / (a_bc.norm(dim=1) * b_bc.norm(dim=1))


class PairProjection(FittedModule):
    """H_ij^i and H_ij^j of one pair of modalities; without components until `fit`.

    Args:
        x_size, y_size: features of i and of j.
    """

    x_mean: Tensor
    y_mean: Tensor
    x_map: Tensor
    y_map: Tensor

    def __init__(self, x_size: int, y_size: int) -> None:
        super().__init__()
        self.register_buffer("x_mean", torch.zeros(x_size))
        self.register_buffer("y_mean", torch.zeros(y_size))
        self.register_buffer("x_map", torch.zeros(0, x_size))
        self.register_buffer("y_map", torch.zeros(0, y_size))

    def fit(self, x_nd: Tensor, y_nd: Tensor, components: int, ridge: float) -> None:
        """Take the maps from vectors (N, D) of training samples that have both; none of fewer than two samples."""
        if len(x_nd) < 2:
            self.assign(x_map=self.x_map[:0], y_map=self.y_map[:0])
            return
        fitted = canonical_correlations(x_nd, y_nd, components, ridge)
        self.assign(x_mean=fitted.x_mean, y_mean=fitted.y_mean, x_map=fitted.x_map, y_map=fitted.y_map)

    def forward(self, x_bd: Tensor, y_bd: Tensor) -> Tensor:
        """ρ (B,) of vectors (B, D); NaN where it is not defined."""
        x_bc = (x_bd - self.x_mean.to(x_bd)) @ self.x_map.to(x_bd).T
        y_bc = (y_bd - self.y_mean.to(y_bd)) @ self.y_map.to(y_bd).T
        return component_correlation(x_bc, y_bc)


class ModalityCheck(nn.Module):
    """Which modalities are effective, by canonical correlations fitted on training data.

    Args:
        modalities: modality → features D.
        components: C at most; fewer for a pair where one has fewer features.
        tau: τ, or None: each pair has the `false_alarms` quantile of the ρ of training samples that were left out of
            the fit of its projections (of every second one; then all are used). The projections fit the training
            data better than any other, so the ρ of the samples of the fit would promise too much.
        rule: when a modality is ineffectual: if ρ < τ with "all" others of the sample, or with "any". One noisy
            modality of three has a low ρ in two of the three pairs, which between them name every modality: "any",
            Eq. 1 to the letter, then finds nothing effective, while "all" finds the noisy one.
        ridge: of `canonical_correlations`.
        false_alarms: in (0, 1).
    """

    tau: Tensor

    def __init__(
        self,
        modalities: Mapping[str, int],
        *,
        components: int = 100,
        tau: float | None = None,
        rule: Literal["all", "any"] = "all",
        ridge: float = 0.0,
        false_alarms: float = 0.05,
    ) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.pairs = tuple(combinations(range(len(self.modalities)), 2))
        self.components = components
        self.rule = rule
        self.ridge = ridge
        self.given_tau = tau
        self.false_alarms = false_alarms
        sizes = list(modalities.values())
        self.projections = nn.ModuleList(PairProjection(sizes[i], sizes[j]) for i, j in self.pairs)
        self.register_buffer("tau", torch.full((len(self.pairs),), -1.0 if tau is None else tau))

    def fit(self, vectors: Mapping[str, Tensor], present_nm: Tensor) -> None:
        """Take the projections, and τ where none is given, from the training data.

        Args:
            vectors: modality → (N, D) floating.
            present_nm: (N, M) bool, which modalities a sample has; a pair is fitted on the samples that have both.
        """
        for k, (i, j) in enumerate(self.pairs):
            both_n = present_nm[:, i] & present_nm[:, j]
            x_nd, y_nd = (vectors[self.modalities[m]][both_n] for m in (i, j))
            projection = self.projections[k]
            assert isinstance(projection, PairProjection)
            if self.given_tau is None:
                projection.fit(x_nd[::2], y_nd[::2], self.components, self.ridge)
                self.tau[k] = _quantile(projection(x_nd[1::2], y_nd[1::2]), self.false_alarms)
            projection.fit(x_nd, y_nd, self.components, self.ridge)

    def correlations(self, vectors: Mapping[str, Tensor], present_bm: Tensor) -> Tensor:
        """ρ (B, P) in the order of `pairs`; NaN where one of the two is missing or ρ is not defined."""
        rho = [
            projection(*(vectors[self.modalities[m]] for m in pair)).masked_fill(
                ~present_bm[:, list(pair)].all(dim=1), torch.nan
            )
            for pair, projection in zip(self.pairs, self.projections, strict=True)
        ]
        return torch.stack(rho, dim=1) if rho else present_bm.new_zeros(len(present_bm), 0, dtype=self.tau.dtype)

    def forward(self, vectors: Mapping[str, Tensor], present_bm: Tensor) -> Tensor:
        """I_e (B, M) bool of vectors (B, D) and the modalities that are there (B, M).

        A missing modality is ineffectual. So is, by itself, none that has no partner to be compared with. Where none
        would be effective nothing can be told of those that are there, and they count as effective.
        """
        rho_bp = self.correlations(vectors, present_bm)
        low_bp = rho_bp < self.tau.to(rho_bp)  # False for NaN
        defined_bp = ~rho_bp.isnan()
        effective_bm = present_bm.clone()
        for m in range(len(self.modalities)):
            own = [k for k, pair in enumerate(self.pairs) if m in pair]
            low_b = low_bp[:, own].any(dim=1)
            if self.rule == "all":
                low_b = low_b & (low_bp[:, own] | ~defined_bp[:, own]).all(dim=1)
            effective_bm[:, m] &= ~low_b
        return torch.where(effective_bm.any(dim=1, keepdim=True), effective_bm, present_bm)


def _quantile(rho_n: Tensor, share: float) -> float:
    """Of the values that are numbers; −1, below which no correlation is, where there are none."""
    numbers = rho_n[~rho_n.isnan()].sort().values
    return float(numbers[int(share * len(numbers))]) if len(numbers) else -1.0

"""Proxy feature vectors of M3ER: an ineffectual modality regenerated from the effective ones (`proxy_vectors`).

The proxies from all effective modalities are averaged.

Shape suffixes: n training samples, b samples, p neighbours, d features of the effective modality, e of the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmer_fast.systems.m3er.fitted import FittedModule


def coefficients(f_bd: Tensor, v_bpd: Tensor, ridge: float = 0.0) -> Tensor:
    """a (B, p) of f ≈ Σ_j a_j v_j, in the least squares sense and, where many are best, the smallest.

    Args:
        f_bd: (B, D).
        v_bpd: (B, p, D), vectors of each sample's neighbours.
        ridge: r ≥ 0; a minimises ‖f − Σ_j a_j v_j‖² + r s ‖a‖² with s the mean ‖v_j‖². With 0 the system is solved as
            it stands, by singular values, which is slow for hundreds of neighbours; noise in v then grows without
            bound as p approaches D.

    Computed in float64; in the dtype of `f_bd`.
    """
    f_b1d, v_wide_bpd = f_bd.double()[:, None], v_bpd.double()
    if ridge == 0:
        return (f_b1d @ torch.linalg.pinv(v_wide_bpd))[:, 0].to(f_bd)
    gram_bpp = v_wide_bpd @ v_wide_bpd.transpose(1, 2)
    size_b1 = gram_bpp.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    size_b1 = size_b1 + torch.finfo(size_b1.dtype).tiny ** 0.5  # all neighbours 0: a = 0
    damped_bpp = gram_bpp + torch.diag_embed((ridge * size_b1).expand(gram_bpp.shape[:2]))
    a_bp1 = torch.cholesky_solve(v_wide_bpd @ f_b1d.transpose(1, 2), torch.linalg.cholesky(damped_bpp))
    return a_bp1[..., 0].to(f_bd)


def proxy_vectors(f_bd: Tensor, v_nd: Tensor, w_ne: Tensor, neighbours: int, ridge: float = 0.0) -> Tensor:
    """What an ineffectual modality would have been, from an effective one.

    With the p nearest training vectors v_j (L2) of an effective modality's vector f, and the vectors w_j that the same
    samples have in the ineffectual one:

        f = Σ_j a_j v_j        proxy = T f = Σ_j a_j T v_j = Σ_j a_j w_j

    for any linear T with w_j = T v_j.

    Args:
        f_bd: f, (B, D).
        v_nd: v, (N, D), of training samples that have both modalities.
        w_ne: w, (N, E), of the same samples.
        neighbours: p; all N samples where there are fewer.
        ridge: of `coefficients`.

    Returns:
        The proxies, (B, E).

    Raises:
        ValueError: N is 0, differs between v and w, or sizes do not match.
    """
    if v_nd.dim() != 2 or w_ne.dim() != 2 or len(v_nd) != len(w_ne) or len(v_nd) == 0:
        raise ValueError(f"v and w must be (N >= 1, D) and (N, E), got {tuple(v_nd.shape)} and {tuple(w_ne.shape)}")
    if f_bd.dim() != 2 or f_bd.shape[1] != v_nd.shape[1]:
        raise ValueError(f"f must have shape (B, {v_nd.shape[1]}), got {tuple(f_bd.shape)}")
    nearest_bp = torch.cdist(f_bd, v_nd).topk(min(neighbours, len(v_nd)), largest=False, sorted=False).indices
    a_bp = coefficients(f_bd, v_nd[nearest_bp], ridge)
    return (a_bp[:, None] @ w_ne[nearest_bp])[:, 0]


class TrainingVectors(FittedModule):
    """Feature vectors of one modality of the training samples; none until they are assigned.

    Args:
        size: features D.
    """

    vectors: Tensor
    effective: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(0, size))
        self.register_buffer("effective", torch.zeros(0, dtype=torch.bool))


class ProxyVectors(nn.Module):
    """Proxies for the ineffectual modalities of a batch.

    Args:
        modalities: modality → features D.
        neighbours: p, or None: as many as the effective modality has features, a basis of its space.
        ridge: of `coefficients`.
    """

    CHUNK = 64  # samples whose neighbours are in memory at a time

    def __init__(self, modalities: Mapping[str, int], *, neighbours: int | None = None, ridge: float = 0.0) -> None:
        super().__init__()
        self.modalities = dict(modalities)
        self.neighbours = neighbours
        self.ridge = ridge
        self.training_vectors = nn.ModuleList(TrainingVectors(size) for size in self.modalities.values())

    def fit(self, vectors: Mapping[str, Tensor], effective_nm: Tensor) -> None:
        """Keep the vectors (N, D) of training samples, and which of their modalities are effective, (N, M) bool."""
        for m, name in enumerate(self.modalities):
            self._of(m).assign(vectors=vectors[name], effective=effective_nm[:, m])

    def forward(self, vectors: Mapping[str, Tensor], effective_bm: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Proxies of the ineffectual modalities.

        Args:
            vectors: modality → (B, D).
            effective_bm: (B, M) bool.

        Returns:
            modality → (B, D), 0 where there is no proxy; and where there is one, (B, M) bool: where the modality is
            ineffectual, another is effective, and training samples have both.
        """
        proxies, available = {}, []
        for target, name in enumerate(self.modalities):
            total_be = torch.zeros_like(vectors[name])
            count_b = torch.zeros(len(total_be), dtype=torch.long, device=total_be.device)
            for source, source_name in enumerate(self.modalities):
                bank_v, bank_w = self._shared(source, target)
                rows = (effective_bm[:, source] & ~effective_bm[:, target]).nonzero()[:, 0]
                if source == target or len(bank_v) == 0:
                    continue
                for part in rows.split(self.CHUNK):
                    total_be[part] += self._proxies(vectors[source_name][part], bank_v, bank_w)
                count_b[rows] += 1
            proxies[name] = total_be / count_b.clamp(min=1)[:, None]
            available.append(count_b > 0)
        return proxies, torch.stack(available, dim=1)

    def _proxies(self, f_bd: Tensor, v_nd: Tensor, w_ne: Tensor) -> Tensor:
        neighbours = f_bd.shape[1] if self.neighbours is None else self.neighbours
        return proxy_vectors(f_bd, v_nd.to(f_bd), w_ne.to(f_bd), neighbours, self.ridge)

    def _shared(self, source: int, target: int) -> tuple[Tensor, Tensor]:
        """The vectors in both modalities of training samples in which both are effective."""
        v, w = self._of(source), self._of(target)
        both_n = v.effective & w.effective
        return v.vectors[both_n], w.vectors[both_n]

    def _of(self, modality: int) -> TrainingVectors:
        kept = self.training_vectors[modality]
        assert isinstance(kept, TrainingVectors)
        return kept

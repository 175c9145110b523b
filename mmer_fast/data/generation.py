"""What the generators of data share: a background of features, and units planted in it.

Background. Every modality is a stationary AR(1) process in a few latent factors, mixed to the feature size, plus a
constant offset of the speaker and white noise, so neighbouring units resemble each other and features are correlated.
With latent z of r factors and mixing matrix A (r, D):

    z_t = phi z_{t-1} + sqrt(1 - phi^2) e_t        x_t = (z_t + s) A + w_t

Signal. A unit receives a class's prototype p_k of its modality, with a random strength:

    x_t += a p_k,   |p_k| = 1

Shapes: N samples, T time steps, D features, r latent factors, K classes, U units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Modality:
    """How the features of a modality are drawn.

    Attributes:
        size: features D.
        factors: latent factors r of the background.
        persistence: phi of the AR(1) process, in [0, 1).
        carries: probability that it carries a present emotion.
        strength: mean length a of the planted vector; white noise has unit variance in each feature.
    """

    size: int
    factors: int
    persistence: float
    carries: float
    strength: float


Units = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Sample, position and class of each of U units, (U,) int64."""


def draw_lengths(rng: np.random.Generator, n: int, max_length: int) -> np.ndarray:
    """(N,) int64, log-normal, clipped to [3, T]; the median of 0.41 T gives a clipped mean of 0.45 T."""
    raw = np.exp(np.log(0.41 * max_length) + 0.5 * rng.standard_normal(n))
    return np.clip(np.rint(raw), 3, max_length).astype(np.int64)


def draw_mixing(rng: np.random.Generator, spec: Modality) -> np.ndarray:
    """(r, D) float32: from latent factors to features, each of which gets unit variance."""
    return (rng.standard_normal((spec.factors, spec.size)) / np.sqrt(spec.factors)).astype(np.float32)


def background(
    rng: np.random.Generator,
    lengths_n: np.ndarray,
    steps: int,
    spec: Modality,
    mixing_rd: np.ndarray,
    speaker_n: np.ndarray,
) -> np.ndarray:
    """(N, T, D) float32: speaker offset, AR(1) factors and white noise; zero past the lengths.

    Samples with the same number in `speaker_n`, (N,) integers from 0 on, share the offset.
    """
    n = len(lengths_n)
    innovations_tnr = rng.standard_normal((steps, n, spec.factors), dtype=np.float32)
    latent_tnr = np.empty_like(innovations_tnr)
    latent_tnr[0] = innovations_tnr[0]
    scale = np.float32(np.sqrt(1 - spec.persistence**2))
    for t in range(1, steps):
        latent_tnr[t] = np.float32(spec.persistence) * latent_tnr[t - 1] + scale * innovations_tnr[t]
    speakers = int(speaker_n.max()) + 1
    latent_tnr += 0.5 * rng.standard_normal((speakers, spec.factors), dtype=np.float32)[speaker_n]
    used_nt = np.arange(steps) < lengths_n[:, None]
    units_ud = ordered_product(latent_tnr.transpose(1, 0, 2)[used_nt], mixing_rd)
    units_ud += rng.standard_normal(units_ud.shape, dtype=np.float32)
    x_ntd = np.zeros((n, steps, spec.size), dtype=np.float32)
    x_ntd[used_nt] = units_ud
    return x_ntd


def ordered_product(a_nr: np.ndarray, b_rd: np.ndarray) -> np.ndarray:
    """(N, D), the matrix product summed in the order of r: that of BLAS has other last bits with other threads."""
    product_nd = a_nr[:, :1] * b_rd[0]
    for r in range(1, len(b_rd)):
        product_nd += a_nr[:, r : r + 1] * b_rd[r]
    return product_nd


def draw_units(rng: np.random.Generator, carried_nk: np.ndarray, lengths_n: np.ndarray, most: int) -> Units:
    """One to ``most`` units for every carried emotion; positions are uniform and may coincide."""
    sample_m, label_m = np.nonzero(carried_nk)
    count_m = rng.integers(1, most + 1, size=len(sample_m))
    sample_u, label_u = np.repeat(sample_m, count_m), np.repeat(label_m, count_m)
    position_u = (rng.random(len(sample_u)) * lengths_n[sample_u]).astype(np.int64)
    return sample_u, position_u, label_u


def add_units(
    rng: np.random.Generator, x_ntd: np.ndarray, units: Units, prototypes_kd: np.ndarray, strength: float
) -> None:
    """x[sample, position] += a p[label] in place, with a log-normal of mean ``strength`` and 25 % spread."""
    sample_u, position_u, label_u = units
    amount_u = strength * np.exp(0.25 * rng.standard_normal(len(label_u)) - 0.25**2 / 2)
    np.add.at(x_ntd, (sample_u, position_u), amount_u[:, None].astype(np.float32) * prototypes_kd[label_u])

"""Synthetic data in which every modality shows the same latent state, so that each can be predicted from the others.

The default data (`mmer_fast.data.synthetic`) are the opposite: what a modality says is independent of the others given
the emotions. With a latent s of r factors a sample, mixing matrices A (r, D) and label directions w (r,):

    x_t = (s + e_t) A + n_t        y_k = 1 where s·w_k + ε > the threshold of the label's prevalence

e is an AR(1) process that all modalities share, n white noise in each feature of each of them.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.generation import ordered_product
from mmer_fast.data.ineffectual import make_ineffectual
from mmer_fast.data.ranges import check_factors, check_least, check_sizes
from mmer_fast.data.synthetic import LABEL_NAMES, PREVALENCE

FEATURES = {"text": 60, "video": 35, "audio": 74}
FACTORS = 24
PERSISTENCE = 0.7  # of e
DRIFT = 0.7  # standard deviation of e; that of s is 1
LABEL_NOISE = 0.3  # standard deviation of ε; s·w has 1


def make_correlated(
    seed: int = 0,
    *,
    n_train: int = 1600,
    n_valid: int = 400,
    n_test: int = 600,
    max_length: int = 20,
    noise: float = 1.0,
    noisy_share: float = 0.4,
    missing_share: float = 0.2,
    scale: float = 10.0,
) -> MultiModalData:
    """Generate a data set of correlated modalities; the same arguments give the same bits.

    Args:
        seed: an integer, at least 0.
        n_train, n_valid, n_test: samples a split, each >= 1.
        max_length: T, at least 1; lengths are uniform in [T/2, T] and the same in all modalities.
        noise: standard deviation of what is a feature's own, where that of what it shows of the shared state is 1.
        noisy_share, missing_share, scale: of `make_ineffectual`, for the test split.

    Returns:
        Data with modalities text (60), video (35) and audio (74) and six emotions; the test split has the extras of
        `make_ineffectual`.

    Raises:
        DataError: an argument lies outside its range.
    """
    sizes = {"train": n_train, "valid": n_valid, "test": n_test}
    check_sizes(sizes, seed)
    check_least({"max_length": (max_length, 1)})
    check_factors(noise=noise)
    world_stream, *streams = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(1 + len(sizes)))
    mixing = {name: world_stream.standard_normal((FACTORS, size)) / np.sqrt(FACTORS) for name, size in FEATURES.items()}
    directions_rk = world_stream.standard_normal((FACTORS, len(LABEL_NAMES)))
    directions_rk /= np.linalg.norm(directions_rk, axis=0)
    splits = {
        name: _make_split(rng, mixing, directions_rk, size, max_length, noise)
        for (name, size), rng in zip(sizes.items(), streams, strict=True)
    }
    splits["test"] = make_ineffectual(
        splits["test"], noisy_share=noisy_share, missing_share=missing_share, scale=scale, seed=seed
    )
    return MultiModalData(
        splits=splits,
        label_names=list(LABEL_NAMES),
        modalities=dict(FEATURES),
        source="correlated",
        notes=[f"synthetic data of correlated modalities (seed {seed}), generated, not recorded from people"],
    ).check()


def _make_split(
    rng: np.random.Generator, mixing: dict[str, np.ndarray], directions_rk: np.ndarray, n: int, steps: int, noise: float
) -> Split:
    lengths_n = rng.integers(-(-steps // 2), steps + 1, size=n)
    state_nr = rng.standard_normal((n, FACTORS))
    evidence_nk = ordered_product(state_nr, directions_rk) + LABEL_NOISE * rng.standard_normal((n, len(PREVALENCE)))
    thresholds_k = np.array([NormalDist(0, (1 + LABEL_NOISE**2) ** 0.5).inv_cdf(1 - p) for p in PREVALENCE])
    latent_ntr = state_nr[:, None] + DRIFT * _process(rng, n, steps)
    used_nt = np.arange(steps) < lengths_n[:, None]
    features = {}
    for name, mixing_rd in mixing.items():
        x_ntd = ordered_product(latent_ntr.reshape(n * steps, -1), mixing_rd).reshape(n, steps, -1)
        x_ntd += noise * rng.standard_normal(x_ntd.shape)
        features[name] = np.where(used_nt[..., None], x_ntd, 0.0).astype(np.float32)
    lengths = {name: lengths_n.copy() for name in mixing}
    return Split(features, lengths, (evidence_nk > thresholds_k).astype(np.uint8))


def _process(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """(N, T, r), AR(1) of variance 1."""
    e_ntr = rng.standard_normal((n, steps, FACTORS))
    for t in range(1, steps):
        e_ntr[:, t] = PERSISTENCE * e_ntr[:, t - 1] + (1 - PERSISTENCE**2) ** 0.5 * e_ntr[:, t]
    return e_ntr

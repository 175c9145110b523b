"""The embedded default data set: MOSEI's shape, and a truth that is known.

Background. Every modality is a stationary AR(1) process in a few latent factors, mixed to the feature size,
plus a constant offset for each sample (the speaker) and white noise (`mmer_fast.data.generation` has the equations).

Signal. Each present emotion is carried by a random non-empty set of modalities; in each of them one to
`most_units` *planted units* receive the emotion's prototype p_k of that modality, with a random strength:

    x_t += a p_k,   |p_k| = 1

Absent emotions are sometimes mentioned too: a *decoy* is a single unit with the prototype of an emotion that
the sample does not have. Repetition and agreement between modalities tell planted units from decoys, never
with certainty, so that even a perfect model stays below an F1 of 1.

Text carries most emotions and most strongly, so training leans on it. In the shifted part of the test split
text says nothing: its planted units stay background (code 1) or it is missing altogether (code 2); there
every emotion is carried by audio or video, so it can still be recognised.

Valence and arousal of a modality are those of the emotions that it carries, with noise
(`mmer_fast.data.valence_arousal`); where it carries none, text that says nothing included, they are neutral.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.generation import (
    Modality,
    add_units,
    background,
    draw_lengths,
    draw_mixing,
    draw_units,
    ordered_product,
)
from mmer_fast.data.ranges import check_factors, check_least, check_parts, check_sizes
from mmer_fast.data.valence_arousal import noisy_va

LABEL_NAMES = ["happy", "sad", "anger", "surprise", "disgust", "fear"]
PREVALENCE = (0.53, 0.26, 0.21, 0.10, 0.18, 0.08)
# Correlation of the Gaussian behind the labels: happiness excludes the rest, anger goes with disgust.
LABEL_CORRELATION = (
    (1.00, -0.55, -0.50, -0.05, -0.50, -0.25),
    (-0.55, 1.00, 0.10, 0.00, 0.10, 0.15),
    (-0.50, 0.10, 1.00, 0.00, 0.45, 0.05),
    (-0.05, 0.00, 0.00, 1.00, 0.00, 0.10),
    (-0.50, 0.10, 0.45, 0.00, 1.00, 0.05),
    (-0.25, 0.15, 0.05, 0.10, 0.05, 1.00),
)
DECOY_RATE = 0.35  # a modality holds a decoy of an absent emotion with this probability times the emotion's prevalence
SHIFT_NONE, SHIFT_UNINFORMATIVE, SHIFT_MISSING = 0, 1, 2
_VA_STREAMS = 4  # spawn key; the streams of the world and of the splits have 0 to 3


MODALITIES = {
    "text": Modality(size=300, factors=24, persistence=0.3, carries=0.90, strength=9.0),
    "video": Modality(size=35, factors=8, persistence=0.8, carries=0.55, strength=5.0),
    "audio": Modality(size=74, factors=12, persistence=0.7, carries=0.60, strength=6.0),
}


@dataclass(frozen=True)
class _World:
    """What all splits share: (r, D) mixing matrices and (K, D) unit prototypes, by modality."""

    mixing: dict[str, np.ndarray]
    prototypes: dict[str, np.ndarray]


def make_synthetic(
    seed: int = 0,
    *,
    n_train: int = 1600,
    n_valid: int = 400,
    n_test: int = 600,
    max_length: int = 50,
    signal: float = 1.0,
    most_units: int = 3,
    uninformative_share: float = 0.33,
    missing_share: float = 0.10,
) -> MultiModalData:
    """Generate the embedded data set; the same arguments give the same bits.

    Each split has a random stream of its own, so changing the size of one leaves the others as they were.

    Args:
        seed: an integer, at least 0.
        n_train, n_valid, n_test: samples a split, each >= 1.
        max_length: T; lengths are log-normal with mean about 0.45 T, clipped to [3, T]; at least 8.
        signal: factor on the strength of all planted units; 0 leaves nothing to learn.
        most_units: an emotion has one to this many planted units in each modality that carries it; at least 1.
        uninformative_share, missing_share: shares of the test split where text is so.

    Returns:
        Data with modalities text (300), video (35) and audio (74) and six emotions. ``extras`` of every split
        hold ``planted_{modality}`` (N, T) bool and ``va_{modality}`` (N, 2) float32, valence and arousal in [0, 1];
        those of the test split also ``shift`` (N,) uint8: 0 as in training, 1 text uninformative, 2 text missing.

    Raises:
        DataError: an argument lies outside its range.
    """
    sizes = {"train": n_train, "valid": n_valid, "test": n_test}
    check_sizes(sizes, seed)
    check_least({"max_length": (max_length, 8), "most_units": (most_units, 1)})
    check_factors(signal=signal)
    check_parts(uninformative_share=uninformative_share, missing_share=missing_share)
    world_stream, *streams = _streams(np.random.SeedSequence(seed), 1 + len(sizes))
    va_streams = _streams(np.random.SeedSequence(seed, spawn_key=(_VA_STREAMS,)), len(sizes))
    world = _make_world(world_stream)
    splits = {}
    for (name, size), rng, va_rng in zip(sizes.items(), streams, va_streams, strict=True):
        shift = np.zeros(size, dtype=np.uint8)
        if name == "test":
            order = rng.permutation(size)
            n_uninformative, n_missing = round(uninformative_share * size), round(missing_share * size)
            shift[order[:n_uninformative]] = SHIFT_UNINFORMATIVE
            shift[order[n_uninformative : n_uninformative + n_missing]] = SHIFT_MISSING
        splits[name] = _make_split(rng, va_rng, world, shift, max_length, signal, most_units)
        if name == "test":
            splits[name].extras["shift"] = shift
    return MultiModalData(
        splits=splits,
        label_names=list(LABEL_NAMES),
        modalities={name: spec.size for name, spec in MODALITIES.items()},
        source="synthetic",
        notes=[f"synthetic data (seed {seed}), generated, not recorded from people"],
    ).check()


def _streams(sequence: np.random.SeedSequence, count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(child) for child in sequence.spawn(count)]


def _make_world(rng: np.random.Generator) -> _World:
    mixing, prototypes = {}, {}
    for name, spec in MODALITIES.items():
        mixing[name] = draw_mixing(rng, spec)
        directions = rng.standard_normal((len(LABEL_NAMES), spec.size))
        prototypes[name] = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)
    return _World(mixing, prototypes)


def _make_split(
    rng: np.random.Generator,
    va_rng: np.random.Generator,
    world: _World,
    shift: np.ndarray,
    max_length: int,
    signal: float,
    most_units: int,
) -> Split:
    n = len(shift)
    labels_nk = _draw_labels(rng, n)
    lengths_n = draw_lengths(rng, n, max_length)
    carriers = _draw_carriers(rng, labels_nk, shift)
    features, lengths, extras = {}, {}, {}
    for name, spec in MODALITIES.items():
        x_ntd = background(rng, lengths_n, max_length, spec, world.mixing[name], np.arange(n))
        planted = draw_units(rng, carriers[name], lengths_n, most=most_units)
        decoys = draw_units(rng, _draw_decoys(rng, name, labels_nk, shift), lengths_n, most=1)
        for units in (decoys, planted):
            add_units(rng, x_ntd, units, world.prototypes[name], signal * spec.strength)
        planted_nt = np.zeros((n, max_length), dtype=bool)
        planted_nt[planted[0], planted[1]] = True
        lengths[name] = lengths_n.copy()
        if name == "text":
            lengths[name][shift == SHIFT_MISSING] = 0
            x_ntd[shift == SHIFT_MISSING] = 0
        features[name], extras[f"planted_{name}"] = x_ntd, planted_nt
        extras[f"va_{name}"] = noisy_va(va_rng, carriers[name], LABEL_NAMES)
    return Split(features, lengths, labels_nk, extras)


def _draw_labels(rng: np.random.Generator, n: int) -> np.ndarray:
    """(N, K) multi-hot by thresholding a correlated Gaussian, which keeps each label's prevalence."""
    thresholds = np.array([NormalDist().inv_cdf(1 - p) for p in PREVALENCE])
    factor_kk = np.linalg.cholesky(np.array(LABEL_CORRELATION))
    gaussian_nk = ordered_product(rng.standard_normal((n, len(PREVALENCE))), factor_kk.T)
    return (gaussian_nk > thresholds).astype(np.uint8)


def _draw_carriers(rng: np.random.Generator, labels_nk: np.ndarray, shift: np.ndarray) -> dict[str, np.ndarray]:
    """modality -> (N, K) bool: which present emotions it carries. Every one is carried by some modality."""
    shifted_n1 = (shift != SHIFT_NONE)[:, None]
    carriers = {
        name: labels_nk.astype(bool) & (rng.random(labels_nk.shape) < m.carries) for name, m in MODALITIES.items()
    }
    carriers["text"] &= ~shifted_n1
    silent_nk = labels_nk.astype(bool) & ~np.logical_or.reduce(list(carriers.values()))
    by_audio_nk = rng.random(labels_nk.shape) < 0.5
    carriers["text"] |= silent_nk & ~shifted_n1
    carriers["audio"] |= silent_nk & shifted_n1 & by_audio_nk
    carriers["video"] |= silent_nk & shifted_n1 & ~by_audio_nk
    return carriers


def _draw_decoys(rng: np.random.Generator, name: str, labels_nk: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(N, K) bool: which absent emotions a modality mentions; none in shifted text."""
    decoys_nk = (labels_nk == 0) & (rng.random(labels_nk.shape) < DECOY_RATE * np.array(PREVALENCE))
    if name == "text":
        decoys_nk &= (shift == SHIFT_NONE)[:, None]
    return decoys_nk

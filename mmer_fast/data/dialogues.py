"""Generated conversations, with a truth that is known: the default data set of systems that look at whole dialogues.

A dialogue is a row of utterances by speakers who take turns; an utterance is a sample, with one of the six classes of
IEMOCAP. Background and planted units are those of `mmer_fast.data.generation`; a speaker's offset is the same
throughout a dialogue.

Context. A speaker's emotion has inertia: at each of its turns it is its last one with probability rho, else (with
probability c) what another speaker's last utterance showed, else drawn anew from the prevalence, which is so that of
every turn. What was said before and after therefore tells about an utterance whose own modalities are silent.

Modalities. Each carries an utterance's emotion only sometimes (`carried_*`), and else may hold a decoy, the prototype
of another emotion. Besides, it cannot tell all emotions apart: the prototypes of emotions that are alike to a modality
(to text in valence, to audio in arousal, to video in the face) share a direction u_m,

    p_k = sqrt(w) u_m(k) + sqrt(1 - w) v_k    scaled to length 1,

and what one confuses another tells apart.

Culture. A dialogue belongs to one of three cultures, which sound and look different: culture c has gains g and an
offset b for each modality's features, the offset half along the prototypes, so that it is mistaken for emotion,

    x_t <- g_c * x_t + b_c
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.errors import DataError
from mmer_fast.data.generation import (
    Modality,
    add_units,
    background,
    draw_lengths,
    draw_mixing,
    draw_units,
    ordered_product,
)
from mmer_fast.data.labels import IEMOCAP_SIX
from mmer_fast.data.ranges import check_factors, check_least, check_sizes

LABEL_NAMES = IEMOCAP_SIX
PREVALENCE = (0.09, 0.15, 0.23, 0.15, 0.14, 0.24)  # about that of IEMOCAP
MODALITIES = {
    "text": Modality(size=100, factors=16, persistence=0.3, carries=0.55, strength=8.0),
    "video": Modality(size=35, factors=8, persistence=0.8, carries=0.35, strength=6.5),
    "audio": Modality(size=74, factors=12, persistence=0.7, carries=0.45, strength=7.0),
}
ALIKE = {  # the group of each class, in the order of the labels
    "text": (0, 1, 2, 1, 0, 1),
    "video": (0, 1, 2, 3, 0, 1),
    "audio": (0, 1, 1, 2, 2, 0),
}
ALIKENESS = 0.5  # w: cosine of two prototypes that are alike, about
DECOY_RATE = 0.3  # a modality that does not carry the emotion holds a decoy with this probability
TURN_RATE = 0.75  # the next utterance is another speaker's with this probability
CONTAGION = 0.1  # c
CULTURES = 3
_STREAM = 0xD1A7  # keeps the random streams apart from those of other generators with the same seed


@dataclass(frozen=True)
class _World:
    """What all splits share, by modality: (r, D) mixing, (K, D) prototypes, (cultures, D) gains and offsets."""

    mixing: dict[str, np.ndarray]
    prototypes: dict[str, np.ndarray]
    gains: dict[str, np.ndarray]
    offsets: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Course:
    """How the dialogues of a split go: for each of N utterances its dialogue, position, speaker and class, int64."""

    dialogue: np.ndarray
    position: np.ndarray
    speaker: np.ndarray
    emotion: np.ndarray


def make_dialogues(
    seed: int = 0,
    *,
    n_train: int = 120,
    n_valid: int = 40,
    n_test: int = 60,
    max_utterances: int = 24,
    max_length: int = 16,
    speakers: int = 2,
    inertia: float = 0.8,
    signal: float = 1.0,
    culture_shift: float = 1.0,
    culture_shares: Sequence[float] = (0.4, 0.35, 0.25),
    test_culture_shares: Sequence[float] | None = None,
    missing_share: float = 0.0,
) -> MultiModalData:
    """Generate conversations; the same arguments give the same bits.

    Each split has a random stream of its own, so changing the size of one leaves the others as they were. No stream is
    one of `make_synthetic`.

    Args:
        seed: an integer, at least 0.
        n_train, n_valid, n_test: dialogues a split, each >= 1.
        max_utterances: of a dialogue, at least 8; numbers of utterances are log-normal with mean about 0.45 of it, at
            least 3.
        max_length: T, at least 8; lengths are log-normal with mean about 0.45 T, clipped to [3, T].
        speakers: of a dialogue, at least 1.
        inertia: rho in [0, 1], probability that a speaker's emotion stays; 0 leaves next to no context.
        signal: factor on the strength of all planted units; 0 leaves nothing to learn.
        culture_shift: factor on the cultures' offsets and on the logarithm of their gains; with 0 cultures are alike.
        culture_shares: share of each of three cultures among the dialogues, with a sum of 1.
        test_culture_shares: that of the test split, where it differs: (0, 0, 1) after training on (0.5, 0.5, 0) asks
            for what holds in a culture never seen.
        missing_share: probability, in [0, 1), that a modality of an utterance is missing; one of them always is there.

    Returns:
        Data with modalities text (100), video (35) and audio (74), utterance by utterance in the order of the
        dialogues, and six classes of which each utterance has one. ``extras`` of every split hold, (N,) each,
        ``dialogue``, ``position`` within it, ``speaker`` (from 0 within a dialogue) and ``culture`` (0, 1 or 2), all
        int64; ``carried_{modality}`` bool: whether the modality shows the emotion; and ``planted_{modality}`` (N, T)
        bool, where.

    Raises:
        DataError: an argument lies outside its range.
    """
    sizes = {"train": n_train, "valid": n_valid, "test": n_test}
    check_sizes(sizes, seed)
    check_least({"speakers": (speakers, 1), "max_utterances": (max_utterances, 8), "max_length": (max_length, 8)})
    check_factors(signal=signal, culture_shift=culture_shift)
    if not 0 <= inertia <= 1:
        raise DataError(f"inertia: expected a value in [0, 1]; got {inertia}")
    if not 0 <= missing_share < 1:
        raise DataError(f"missing_share: expected a value in [0, 1); got {missing_share}")
    shares = _check_shares("culture_shares", culture_shares)
    test_shares = shares if test_culture_shares is None else _check_shares("test_culture_shares", test_culture_shares)

    root = np.random.SeedSequence(seed, spawn_key=(_STREAM,))
    world_stream, *streams = (np.random.default_rng(s) for s in root.spawn(1 + len(sizes)))
    world = _make_world(world_stream, culture_shift)
    splits = {}
    for (name, size), rng in zip(sizes.items(), streams, strict=True):
        culture_d = rng.choice(CULTURES, size=size, p=test_shares if name == "test" else shares)
        course = _draw_course(rng, draw_lengths(rng, size, max_utterances), speakers, inertia)
        splits[name] = _make_split(rng, world, course, culture_d, max_length, signal, missing_share)
    return MultiModalData(
        splits=splits,
        label_names=list(LABEL_NAMES),
        modalities={name: spec.size for name, spec in MODALITIES.items()},
        source="dialogues",
        notes=[f"dialogues (seed {seed}), generated, not recorded from people"],
    ).check()


def _check_shares(name: str, shares: Sequence[float]) -> np.ndarray:
    values = np.asarray(shares, dtype=np.float64)
    if values.shape != (CULTURES,) or not (values >= 0).all() or not np.isclose(values.sum(), 1):
        raise DataError(f"{name}: expected {CULTURES} values >= 0 with a sum of 1; got {shares}")
    return values / values.sum()


def _make_world(rng: np.random.Generator, culture_shift: float) -> _World:
    mixing, prototypes, gains, offsets = {}, {}, {}, {}
    for name, spec in MODALITIES.items():
        mixing[name] = draw_mixing(rng, spec)
        shared = _unit_rows(rng.standard_normal((len(LABEL_NAMES), spec.size)))[list(ALIKE[name])]
        own = _unit_rows(rng.standard_normal((len(LABEL_NAMES), spec.size)))
        prototypes[name] = _unit_rows(np.sqrt(ALIKENESS) * shared + np.sqrt(1 - ALIKENESS) * own).astype(np.float32)
        emotional = _unit_rows(ordered_product(rng.standard_normal((CULTURES, len(LABEL_NAMES))), prototypes[name]))
        other = _unit_rows(rng.standard_normal((CULTURES, spec.size)))
        offset = culture_shift * 0.5 * spec.strength * _unit_rows(emotional + other)
        offsets[name] = offset.astype(np.float32)
        gains[name] = np.exp(0.2 * culture_shift * rng.standard_normal((CULTURES, spec.size))).astype(np.float32)
    return _World(mixing, prototypes, gains, offsets)


def _unit_rows(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _draw_course(rng: np.random.Generator, counts_d: np.ndarray, speakers: int, inertia: float) -> _Course:
    """Turns and emotions of dialogues with so many utterances, all dialogues at a time."""
    dialogues, longest = len(counts_d), int(counts_d.max())
    every = np.arange(dialogues)
    speaker_dp = np.empty((dialogues, longest), dtype=np.int64)
    emotion_dp = np.empty((dialogues, longest), dtype=np.int64)
    last_ds = np.full((dialogues, speakers), -1)  # each speaker's emotion, -1 before its first turn
    fresh_dp = rng.choice(len(PREVALENCE), size=(dialogues, longest), p=np.array(PREVALENCE) / sum(PREVALENCE))
    for p in range(longest):
        speaker_d = rng.integers(0, speakers, size=dialogues)
        if p > 0:
            before_d = speaker_dp[:, p - 1]
            step_d = rng.integers(1, max(speakers, 2), size=dialogues) * (rng.random(dialogues) < TURN_RATE)
            speaker_d = (before_d + step_d) % speakers
        own_d = last_ds[every, speaker_d]
        heard_d = np.where(speaker_d == before_d, -1, emotion_dp[:, p - 1]) if p > 0 else np.full(dialogues, -1)
        chance_d = rng.random(dialogues)
        copied_d = np.where(chance_d < inertia, own_d, np.where(chance_d < inertia + CONTAGION, heard_d, -1))
        emotion_dp[:, p] = np.where(copied_d >= 0, copied_d, fresh_dp[:, p])
        speaker_dp[:, p], last_ds[every, speaker_d] = speaker_d, emotion_dp[:, p]
    dialogue, position = np.nonzero(np.arange(longest) < counts_d[:, None])
    return _Course(dialogue, position, speaker_dp[dialogue, position], emotion_dp[dialogue, position])


def _make_split(
    rng: np.random.Generator,
    world: _World,
    course: _Course,
    culture_d: np.ndarray,
    max_length: int,
    signal: float,
    missing_share: float,
) -> Split:
    n, classes = len(course.emotion), len(LABEL_NAMES)
    culture_n = culture_d[course.dialogue]
    labels_nk = np.eye(classes, dtype=np.uint8)[course.emotion]
    voice_n = course.dialogue * (course.speaker.max() + 1) + course.speaker
    lengths_n = draw_lengths(rng, n, max_length)
    missing_nm = _draw_missing(rng, n, missing_share)
    features, lengths = {}, {}
    extras = {"dialogue": course.dialogue, "position": course.position, "speaker": course.speaker, "culture": culture_n}
    for m, (name, spec) in enumerate(MODALITIES.items()):
        present_n = ~missing_nm[:, m]
        lengths[name] = lengths_n * present_n
        x_ntd = background(rng, lengths[name], max_length, spec, world.mixing[name], voice_n)
        carried_n = (rng.random(n) < spec.carries) & present_n
        mentions_n = (rng.random(n) < DECOY_RATE) & ~carried_n & present_n
        other_n = (course.emotion + rng.integers(1, classes, size=n)) % classes
        planted = draw_units(rng, labels_nk.astype(bool) & carried_n[:, None], lengths_n, most=3)
        decoys = draw_units(rng, np.eye(classes, dtype=bool)[other_n] & mentions_n[:, None], lengths_n, most=1)
        for units in (decoys, planted):
            add_units(rng, x_ntd, units, world.prototypes[name], signal * spec.strength)
        used_nt = np.arange(max_length) < lengths[name][:, None]
        culture_u = culture_n[np.nonzero(used_nt)[0]]
        x_ntd[used_nt] = x_ntd[used_nt] * world.gains[name][culture_u] + world.offsets[name][culture_u]
        planted_nt = np.zeros((n, max_length), dtype=bool)
        planted_nt[planted[0], planted[1]] = True
        features[name] = x_ntd
        extras[f"carried_{name}"], extras[f"planted_{name}"] = carried_n, planted_nt
    return Split(features, lengths, labels_nk, extras)


def _draw_missing(rng: np.random.Generator, n: int, share: float) -> np.ndarray:
    """(N, modalities) bool: what is missing; where that would be everything, one modality is kept."""
    missing_nm = rng.random((n, len(MODALITIES))) < share
    kept_n = rng.integers(0, len(MODALITIES), size=n)
    nothing_n = missing_nm.all(axis=1)
    missing_nm[nothing_n, kept_n[nothing_n]] = False
    return missing_nm

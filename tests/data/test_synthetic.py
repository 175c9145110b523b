from __future__ import annotations

import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from mmer_fast.data import DataError, load, make_synthetic
from mmer_fast.data.generation import Modality, add_units, background
from mmer_fast.data.synthetic import DECOY_RATE, LABEL_CORRELATION, MODALITIES, PREVALENCE
from mmer_fast.data.valence_arousal import NRC_VAD, SCORE_NOISE, expressed_va


@pytest.fixture(scope="module")
def data():
    return make_synthetic(0)


def test_shape_of_mosei(data):
    assert data.modalities == {"text": 300, "video": 35, "audio": 74}
    assert data.label_names == ["happy", "sad", "anger", "surprise", "disgust", "fear"]
    train = data.splits["train"]
    assert np.allclose(train.labels.mean(axis=0), PREVALENCE, atol=0.04)
    assert (train.labels.sum(axis=1) > 0).mean() > 0.8
    lengths = train.lengths["text"]
    assert lengths.mean() == pytest.approx(22, abs=1.5)
    assert 1 - lengths.mean() / 50 == pytest.approx(0.55, abs=0.03)
    assert lengths.min() >= 3
    assert lengths.max() == 50


def test_label_correlation_is_one(data):
    correlation = np.array(LABEL_CORRELATION)
    assert np.array_equal(correlation, correlation.T)
    assert np.linalg.eigvalsh(correlation).min() > 0


def test_every_present_emotion_has_planted_units(data):
    for split in data.splits.values():
        anywhere = np.logical_or.reduce([split.extras[f"planted_{m}"].any(axis=1) for m in data.modalities])
        assert np.array_equal(anywhere, split.labels.any(axis=1))
        for modality, lengths in split.lengths.items():
            planted = split.extras[f"planted_{modality}"]
            assert not planted[np.arange(50) >= lengths[:, None]].any()
            assert 0.02 < planted.sum() / lengths.sum() < 0.2


def test_planted_units_point_at_the_prototypes(data):
    """Samples with one label: their mean planted unit, less that of all, agrees between two splits."""
    directions = {}
    for name in ("train", "valid"):
        split = data.splits[name]
        single = split.labels.sum(axis=1) == 1
        rows = []
        for k in range(3):
            chosen = single & (split.labels[:, k] == 1)
            rows.append(split.features["text"][chosen][split.extras["planted_text"][chosen]].mean(axis=0))
        rows = np.stack(rows) - split.features["text"][split.extras["planted_text"]].mean(axis=0)
        directions[name] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = directions["train"] @ directions["valid"].T
    assert np.array_equal(cosine.argmax(axis=1), [0, 1, 2])
    assert np.diag(cosine).min() > 0.5


def test_shifted_part_of_the_test_split(data):
    test = data.splits["test"]
    shift, text, length = test.extras["shift"], test.extras["planted_text"], test.lengths["text"]
    assert [np.mean(shift == code).round(2) for code in (0, 1, 2)] == [0.57, 0.33, 0.10]
    assert np.array_equal(length == 0, shift == 2)
    assert not text[shift > 0].any()
    assert text[shift == 0].any()
    assert test.lengths["audio"].min() > 0
    heard = test.extras["planted_audio"].any(axis=1) | test.extras["planted_video"].any(axis=1)
    assert np.array_equal(heard[shift > 0], test.labels[shift > 0].any(axis=1))
    assert "shift" not in data.splits["train"].extras


@pytest.mark.parametrize("name", ["synthetic", "dialogues", "correlated"])
def test_the_bits_do_not_depend_on_the_number_of_threads(name):
    """Or a run could not go on where there are more."""
    script = "import sys; from mmer_fast.data import load; from mmer_fast.training.run import describe_data;"
    script += f"print(describe_data(load({name!r}))['checksum'])"
    environments = [{**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads} for threads in "12"]
    printed = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for environment in environments
    ]
    assert printed[0] == printed[1] != b""


def test_same_seed_same_bits_and_splits_are_independent():
    sizes = {"n_train": 20, "n_valid": 10, "n_test": 10}
    first, again, longer, other = (
        make_synthetic(3, **sizes),
        make_synthetic(3, **sizes),
        make_synthetic(3, **sizes | {"n_train": 30}),
        make_synthetic(4, **sizes),
    )
    for modality in first.modalities:
        for split in first.splits:
            assert np.array_equal(first.splits[split].features[modality], again.splits[split].features[modality])
        assert np.array_equal(first.splits["test"].features[modality], longer.splits["test"].features[modality])
        assert not np.array_equal(first.splits["test"].features[modality], other.splits["test"].features[modality])


def test_load_passes_the_seed(monkeypatch):
    small = make_synthetic(n_train=2, n_valid=2, n_test=2)
    seeds = []
    monkeypatch.setattr("mmer_fast.data.loading.make_synthetic", lambda seed: seeds.append(seed) or small)
    assert list(load("synthetic", seed=7, modalities=["audio"]).modalities) == ["audio"]
    assert load("synthetic") is small
    assert seeds == [7, 0]


def _probe(data, modalities):
    """Micro-F1 of logistic regression on the mean unit of each modality."""

    def pooled(split):
        means = [split.features[m].sum(axis=1) / np.maximum(split.lengths[m], 1)[:, None] for m in modalities]
        return np.concatenate(means, axis=1)

    train, valid = pooled(data.splits["train"]), pooled(data.splits["valid"])
    mean, std = train.mean(axis=0), train.std(axis=0)
    labels = data.splits["train"].labels
    predicted = [
        LogisticRegression(C=0.01).fit((train - mean) / std, labels[:, k]).predict((valid - mean) / std)
        for k in range(labels.shape[1])
    ]
    return f1_score(data.splits["valid"].labels, np.stack(predicted, axis=1), average="micro", zero_division=0)


def test_learnable_but_not_solved_and_text_leads(data):
    always_happy = f1_score(data.splits["valid"].labels, np.eye(6, dtype=int)[np.zeros(400, int)], average="micro")
    text, video, together = (
        _probe(data, ["text"]),
        _probe(data, ["video"]),
        _probe(data, list(data.modalities)),
    )
    assert always_happy + 0.1 < together < 0.8
    assert text > video + 0.1
    assert together > text - 0.02


def test_without_signal_nothing_is_learnable():
    nothing, everything = (make_synthetic(0, signal=s, n_train=400, n_valid=400, n_test=1) for s in (0.0, 1.0))
    assert _probe(nothing, list(nothing.modalities)) < 0.4
    assert _probe(everything, list(everything.modalities)) > 0.5


def test_the_signal_is_a_factor_of_the_units_and_of_nothing_else():
    sizes = {"n_train": 30, "n_valid": 1, "n_test": 60, "max_length": 12}
    nothing, once, twice = (make_synthetic(3, signal=s, **sizes).splits for s in (0.0, 1.0, 2.0))
    for split in ("train", "test"):
        for modality, x in once[split].features.items():
            units = x - nothing[split].features[modality]
            assert np.allclose(twice[split].features[modality] - x, units, atol=1e-4)
            assert units[once[split].extras[f"planted_{modality}"]].any(axis=1).all()
            assert not units.any(axis=2).all()
    shifted = once["test"].extras["shift"] > 0
    assert shifted.any()
    assert np.array_equal(once["test"].features["text"][shifted], nothing["test"].features["text"][shifted])


def test_units_are_as_long_as_their_strength_on_average():
    x = np.zeros((1, 20_000, 2), dtype=np.float32)
    units = np.zeros(20_000, int), np.arange(20_000), np.arange(20_000) % 2
    add_units(np.random.default_rng(0), x, units, np.eye(2, dtype=np.float32), 6.0)
    lengths = x[0, np.arange(20_000), units[2]]
    assert lengths.mean() == pytest.approx(6.0, rel=0.01)
    assert lengths.std() / lengths.mean() == pytest.approx(0.25, abs=0.02)


def test_the_background_is_stationary():
    """Of every feature: variance 1 of the factors with persistence 0.8, 1/4 of the speaker, 1 of white noise."""
    spec, n = Modality(size=4, factors=3, persistence=0.8, carries=1.0, strength=1.0), 8000
    mixing = np.full((3, 4), 3**-0.5)
    x = background(np.random.default_rng(0), np.full(n, 30), 30, spec, mixing, np.arange(n))
    assert np.allclose(x.var(axis=0), 2.25, rtol=0.1)
    neighbours = (x[:, 1:] * x[:, :-1]).mean(axis=0)
    assert np.allclose(neighbours, 0.8 + 0.25, rtol=0.15)


def test_more_units_carry_an_emotion_where_asked_for():
    """One to 3 units an emotion are 2 on average, one to 12 are 6.5; some fall on the same place."""
    shares = []
    for most in (3, 12):
        split = make_synthetic(0, most_units=most, n_train=300, n_valid=1, n_test=1, max_length=200).splits["train"]
        carried = split.extras["planted_text"].any(axis=1)
        shares.append(split.extras["planted_text"][carried].sum(axis=1).mean())
    assert 2.8 < shares[1] / shares[0] < 3.3


def test_constants_are_sane():
    assert 0 < DECOY_RATE < 1
    assert max(MODALITIES.values(), key=lambda m: m.carries).size == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_valid": 0}, "n_valid: expected at least 1; got 0"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"max_length": 7}, "max_length: expected at least 8; got 7"),
        ({"signal": -1.0}, "signal: expected a finite value >= 0"),
        ({"signal": float("nan")}, "signal: expected a finite value >= 0"),
        ({"most_units": 0}, "most_units: expected at least 1; got 0"),
        ({"missing_share": 0.8}, "sum of at most 1; got 0.33 and 0.8"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(DataError, match=message):
        make_synthetic(**arguments)


def test_valence_and_arousal_are_those_of_what_a_modality_carries(data):
    """Text carries a lone emotion or nothing: its scores lie around the emotion's values, or around neutral."""
    train = data.splits["train"]
    carries = train.extras["planted_text"].any(axis=1)
    lone = train.labels.sum(axis=1) == 1
    for k, name in enumerate(data.label_names):
        scores = train.extras["va_text"][lone & carries & (train.labels[:, k] == 1)]
        assert np.allclose(scores.mean(axis=0), NRC_VAD[name], atol=0.04)  # clipping moves the mean of happy
        assert np.all(np.abs(scores.std(axis=0) / SCORE_NOISE - 1) < 0.6)
    assert np.allclose(train.extras["va_text"][~carries].mean(axis=0), NRC_VAD["neutral"], atol=0.01)
    shifted = data.splits["test"].extras["shift"] > 0
    assert np.allclose(data.splits["test"].extras["va_text"][shifted].mean(axis=0), NRC_VAD["neutral"], atol=0.01)


def test_expressed_valence_and_arousal():
    present = np.array([[True, False, True], [False, False, False]])
    assert np.allclose(expressed_va(present, ["happy", "sad", "fear"]), [[1.073 / 2, 1.575 / 2], [0.5, 0.5]])


def test_scores_have_streams_of_their_own():
    """What was drawn before there were any scores is the same still (features pass through BLAS, so not their bits)."""
    made = make_synthetic(3, n_train=4, n_valid=2, n_test=3, max_length=8)
    value = 0
    for split in made.splits.values():
        planted = (split.extras[f"planted_{name}"] for name in made.modalities)
        for array in (split.labels, *split.lengths.values(), *planted):
            value = zlib.crc32(np.ascontiguousarray(array).data, value)
    assert f"{value:08x}" == "b348f079"
    longer = make_synthetic(3, n_train=5, n_valid=2, n_test=3, max_length=8)
    for name in ("va_text", "va_video", "va_audio"):
        assert np.array_equal(made.splits["test"].extras[name], longer.splits["test"].extras[name])
        assert made.splits["test"].extras[name].dtype == np.float32

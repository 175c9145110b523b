from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from mmer_fast.data import DataError, load, make_dialogues, make_synthetic
from mmer_fast.data.dialogues import CULTURES, MODALITIES, PREVALENCE

SMALL = {"n_train": 12, "n_valid": 4, "n_test": 5, "max_length": 8, "max_utterances": 8}


@pytest.fixture(scope="module")
def data():
    return make_dialogues(0)


def test_what_there_is(data):
    assert data.modalities == {"text": 100, "video": 35, "audio": 74}
    assert data.label_names == ["hap", "sad", "neu", "ang", "exc", "fru"]
    assert data.source == "dialogues"
    for split in data.splits.values():
        assert (split.labels.sum(axis=1) == 1).all()
        for name in ("dialogue", "position", "speaker", "culture"):
            assert split.extras[name].dtype == np.int64
            assert split.extras[name].shape == (len(split),)
    large = make_dialogues(1, n_train=1500, max_length=8).splits["train"]
    assert np.allclose(large.labels.mean(axis=0), PREVALENCE, atol=0.02)


def test_dialogues_are_rows_of_utterances(data):
    train = data.splits["train"]
    dialogue, position = train.extras["dialogue"], train.extras["position"]
    assert np.array_equal(np.unique(dialogue), np.arange(120))
    starts = np.flatnonzero(np.diff(dialogue, prepend=-1))
    assert (np.diff(dialogue) >= 0).all()
    assert np.array_equal(position, np.arange(len(train)) - starts[dialogue])
    counts = np.bincount(dialogue)
    assert counts.min() >= 3
    assert counts.max() <= 24
    assert counts.mean() == pytest.approx(0.45 * 24, abs=1.5)
    assert set(train.extras["speaker"]) == {0, 1}
    same = dialogue[1:] == dialogue[:-1]
    turns = (train.extras["speaker"][1:] != train.extras["speaker"][:-1])[same].mean()
    assert turns == pytest.approx(0.75, abs=0.06)
    assert all(len(set(train.extras["culture"][dialogue == d])) == 1 for d in range(120))


def _stays(split):
    """How often a speaker's emotion is that of its last turn in the dialogue."""
    voice = split.extras["dialogue"] * 10 + split.extras["speaker"]
    order = np.argsort(voice, kind="stable")
    emotion, voice = split.labels.argmax(axis=1)[order], voice[order]
    return (emotion[1:] == emotion[:-1])[voice[1:] == voice[:-1]].mean()


def test_emotions_have_inertia():
    by_chance = np.square(PREVALENCE).sum()
    sizes = {"n_train": 600, "n_valid": 1, "n_test": 1, "max_length": 8}
    assert _stays(make_dialogues(0, inertia=1.0, **sizes).splits["train"]) == 1
    kept = _stays(make_dialogues(0, inertia=0.6, **sizes).splits["train"])
    assert kept == pytest.approx(0.6 + 0.4 * by_chance, abs=0.05)
    assert _stays(make_dialogues(0, inertia=0.0, **sizes).splits["train"]) == pytest.approx(by_chance, abs=0.04)


def test_modalities_are_silent_at_times_and_the_truth_is_told(data):
    train = data.splits["train"]
    for name, spec in MODALITIES.items():
        carried, planted = train.extras[f"carried_{name}"], train.extras[f"planted_{name}"]
        assert carried.mean() == pytest.approx(spec.carries, abs=0.05)
        assert np.array_equal(planted.any(axis=1), carried)
        assert not planted[np.arange(16) >= train.lengths[name][:, None]].any()
    silent = ~np.logical_or.reduce([train.extras[f"carried_{name}"] for name in MODALITIES])
    assert 0.05 < silent.mean() < 0.35


def test_planted_units_are_where_the_signal_is():
    """The same draws with and without the signal differ at planted units and decoys, and nowhere else."""
    with_signal, without = make_dialogues(0, **SMALL), make_dialogues(0, signal=0.0, **SMALL)
    for name in MODALITIES:
        one, other = with_signal.splits["train"], without.splits["train"]
        changed = (one.features[name] != other.features[name]).any(axis=2)
        assert changed[one.extras[f"planted_{name}"]].all()
        decoys = changed & ~one.extras[f"planted_{name}"]
        assert not decoys[one.extras[f"carried_{name}"]].any()
        assert 0 < decoys.any(axis=1).mean() < 0.4


def test_missing_modalities():
    train = make_dialogues(0, missing_share=0.6, n_train=100).splits["train"]
    lengths = np.stack(list(train.lengths.values()), axis=1)
    assert lengths.any(axis=1).all()
    assert (lengths == 0).mean() == pytest.approx(0.6 - 0.6**3 / 3, abs=0.03)
    for name in MODALITIES:
        assert not train.extras[f"carried_{name}"][train.lengths[name] == 0].any()
    assert all((n > 0).all() for n in make_dialogues(0, **SMALL).splits["train"].lengths.values())


def _means(split, modalities=tuple(MODALITIES)):
    return np.concatenate(
        [split.features[m].sum(axis=1) / np.maximum(split.lengths[m], 1)[:, None] for m in modalities], 1
    )


def _with_context(split, x):
    """The features beside their mean over the speaker's other turns, near ones first."""
    voice = split.extras["dialogue"] * 10 + split.extras["speaker"]
    position = split.extras["position"]
    weight = 0.7 ** np.abs(position[:, None] - position) * (voice[:, None] == voice) * (1 - np.eye(len(x)))
    return np.concatenate([x, weight @ x / np.maximum(weight.sum(axis=1, keepdims=True), 1e-9)], axis=1)


def test_a_speaker_sounds_the_same_throughout_a_dialogue():
    train = make_dialogues(0, signal=0.0, culture_shift=0.0).splits["train"]
    x = _means(train, ["audio"])
    x = x - x.mean(axis=0)
    dialogue, speaker = train.extras["dialogue"], train.extras["speaker"]
    same_dialogue = (dialogue[:, None] == dialogue) & ~np.eye(len(x), dtype=bool)
    same_speaker = same_dialogue & (speaker[:, None] == speaker)
    products = x @ x.T
    assert products[same_speaker].mean() > 10  # 74 features, offsets of variance 0.25
    assert abs(products[same_dialogue & ~same_speaker].mean()) < 3


def _score(train, test, targets=lambda split: split.labels.argmax(axis=1), features=_means):
    """Weighted F1 on `test` of logistic regression fitted to `train`."""
    x, other = features(train), features(test)
    mean, std = x.mean(axis=0), x.std(axis=0)
    model = LogisticRegression(C=0.02, max_iter=300).fit((x - mean) / std, targets(train))
    return f1_score(targets(test), model.predict((other - mean) / std), average="weighted")


def test_learnable_but_not_solved_and_modalities_add_up(data):
    train, valid = data.splits["train"], data.splits["valid"]
    alone = [_score(train, valid, features=lambda split, m=m: _means(split, [m])) for m in MODALITIES]
    together = _score(train, valid)
    assert max(alone) + 0.05 < together < 0.8
    assert alone[0] == max(alone)
    silent = make_dialogues(0, signal=0.0)
    assert _score(silent.splits["train"], silent.splits["valid"]) < 0.3


def test_context_helps_where_emotions_last(data):
    gains = []
    for conversations in (data, make_dialogues(0, inertia=0.0)):
        train, valid = conversations.splits["train"], conversations.splits["valid"]
        both = [_score(train, valid, features=f) for f in (_means, lambda split: _with_context(split, _means(split)))]
        gains.append(both[1] - both[0])
    assert gains[0] > 0.04
    assert gains[1] < 0.02


def test_cultures_differ_and_what_is_learnt_in_two_fails_in_the_third():
    shares = {"culture_shares": (0.5, 0.5, 0.0), "test_culture_shares": (0.0, 0.0, 1.0)}
    losses = []
    for shift in (1.0, 0.0):
        gaps = []
        for seed in (0, 1):
            data = make_dialogues(seed, culture_shift=shift, n_train=150, **shares)
            assert set(data.splits["train"].extras["culture"]) == {0, 1}
            assert set(data.splits["test"].extras["culture"]) == {2}
            gaps.append(_score(data.splits["train"], data.splits["valid"]))
            gaps[-1] -= _score(data.splits["train"], data.splits["test"])
        losses.append(np.mean(gaps))
    assert losses[0] > 0.08
    assert losses[1] < 0.04


def test_cultures_look_like_emotions_in_part():
    """Half of a culture's offset lies in the six directions of the emotions, of the hundred there are in text."""

    def train(**options):
        return make_dialogues(0, n_train=60, n_valid=1, n_test=1, **options).splits["train"]

    alike, silent, shifted = (
        train(culture_shift=0.0),
        train(culture_shift=0.0, signal=0.0),
        train(signal=0.0),
    )
    planted = alike.extras["planted_text"]
    emotion = np.broadcast_to(alike.labels.argmax(axis=1)[:, None], planted.shape)[planted]
    added = (alike.features["text"] - silent.features["text"])[planted]
    basis, _ = np.linalg.qr(np.stack([added[emotion == k].mean(axis=0) for k in range(6)], axis=1))
    used = np.arange(16) < alike.lengths["text"][:, None]
    culture = np.broadcast_to(alike.extras["culture"][:, None], used.shape)[used]
    moved = (shifted.features["text"] - silent.features["text"])[used]
    for c in range(CULTURES):
        offset = moved[culture == c].mean(axis=0)
        share = np.square(offset @ basis).sum() / np.square(offset).sum()
        assert 0.3 < share < 0.8


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_cultures_differ_in_the_gains_of_features(shift):
    """Log-normal, with a deviation of 0.2 times the shift."""
    split = make_dialogues(0, n_train=400, n_valid=1, n_test=1, signal=0.0, culture_shift=shift).splits["train"]
    used = np.arange(16) < split.lengths["text"][:, None]
    culture = np.broadcast_to(split.extras["culture"][:, None], used.shape)[used]
    first, second = (np.log(split.features["text"][used][culture == c].std(axis=0)) for c in (0, 1))
    assert (first - second).std() == pytest.approx(0.2 * 2**0.5 * shift, rel=0.3, abs=0.04)


def test_cultures_can_be_told_apart_unless_they_are_alike(data):
    culture = {"targets": lambda split: split.extras["culture"]}
    assert _score(data.splits["train"], data.splits["test"], **culture) > 0.9
    alike = make_dialogues(0, culture_shift=0.0)
    assert _score(alike.splits["train"], alike.splits["test"], **culture) < 0.55
    assert CULTURES == 3


def test_same_seed_same_bits_and_streams_are_independent():
    first, again, longer, other = (
        make_dialogues(3, **SMALL),
        make_dialogues(3, **SMALL),
        make_dialogues(3, **SMALL | {"n_train": 20}),
        make_dialogues(4, **SMALL),
    )
    for modality in first.modalities:
        for split in first.splits:
            assert np.array_equal(first.splits[split].features[modality], again.splits[split].features[modality])
        assert np.array_equal(first.splits["test"].features[modality], longer.splits["test"].features[modality])
        shapes = [d.splits["test"].features[modality][0, 0] for d in (first, other)]
        assert not np.array_equal(*shapes)
    video = [
        d.splits["train"].features["video"][0, 0] for d in (make_synthetic(3, n_train=12, n_valid=1, n_test=1), first)
    ]
    assert not np.isclose(*video).any()


def test_load_passes_the_seed(monkeypatch):
    small, seeds = make_dialogues(**SMALL), []
    monkeypatch.setattr("mmer_fast.data.loading.make_dialogues", lambda seed: seeds.append(seed) or small)
    assert list(load("dialogues", seed=7, modalities=["audio"]).modalities) == ["audio"]
    assert load("dialogues") is small
    assert seeds == [7, 0]


def test_one_speaker_or_many():
    assert set(make_dialogues(0, speakers=1, **SMALL).splits["train"].extras["speaker"]) == {0}
    many = make_dialogues(0, speakers=5, **SMALL | {"n_train": 50}).splits["train"].extras
    assert set(many["speaker"]) == set(range(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_valid": 0}, "n_valid: expected at least 1; got 0"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"max_length": 7}, "max_length: expected at least 8; got 7"),
        ({"max_utterances": 7}, "max_utterances: expected at least 8; got 7"),
        ({"speakers": 0}, "speakers: expected at least 1; got 0"),
        ({"signal": -1.0}, "signal: expected a finite value >= 0"),
        ({"culture_shift": float("nan")}, "culture_shift: expected a finite value >= 0"),
        ({"inertia": 1.5}, r"inertia: expected a value in \[0, 1\]; got 1.5"),
        ({"missing_share": 1.0}, r"missing_share: expected a value in \[0, 1\); got 1.0"),
        ({"culture_shares": (1.0, 1.0, 0.0)}, "culture_shares: expected 3 values >= 0 with a sum of 1"),
        ({"test_culture_shares": (0.5, 0.5)}, "test_culture_shares: expected 3 values"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(DataError, match=message):
        make_dialogues(**arguments)

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mmer_fast.data import DataError, load, make_dialogues, make_synthetic
from mmer_fast.data.loading import FORMATS, read_unchecked

COUNTS = {"Ses01": 3, "Ses02": 2, "Ses03": 4, "Ses04": 2}


def _content(meld: bool = False) -> list:
    """The tuple of an MMGCN pickle as a list, small: three training dialogues and one for testing."""
    rng = np.random.default_rng(0)
    vectors = [{d: list(rng.standard_normal((n, size))) for d, n in COUNTS.items()} for size in (5, 4, 3)]
    labels = {d: rng.integers(0, 6, size=n).tolist() for d, n in COUNTS.items()}
    content = [
        {d: [f"{d}_{i}" for i in range(n)] for d, n in COUNTS.items()},
        {d: ["M", "F", "M", "F"][:n] for d, n in COUNTS.items()},
        labels,
        *vectors,
        {d: ["well"] * n for d, n in COUNTS.items()},
        ["Ses03", "Ses01", "Ses02"],
        ["Ses04"],
    ]
    return [*content, {}] if meld else content


def _load(tmp_path, content, protocol=2):
    (tmp_path / "IEMOCAP_features.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    return load(tmp_path / "IEMOCAP_features.pkl")


@pytest.mark.parametrize("meld", [False, True])
def test_utterances_are_samples(tmp_path, meld):
    content = _content(meld)
    data = _load(tmp_path, tuple(content))
    assert read_unchecked(tmp_path / "IEMOCAP_features.pkl")[0].name == "mmgcn"
    assert data.modalities == {"text": 5, "video": 3, "audio": 4}
    if meld:
        assert data.label_names == ["neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"]
    else:
        assert data.label_names == ["hap", "sad", "neu", "ang", "exc", "fru"]
    train = data.splits["train"]
    assert train.extras["dialogue"].tolist() == [0] * 4 + [1] * 3  # Ses03 and Ses01, in the file's order
    assert train.extras["position"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert train.extras["speaker"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert train.labels.argmax(axis=1).tolist() == content[2]["Ses03"] + content[2]["Ses01"]
    assert (train.labels.sum(axis=1) == 1).all()
    assert np.array_equal(train.features["audio"][4, 0], content[4]["Ses01"][0].astype(np.float32))
    assert len(data.splits["valid"]) == 2
    assert len(data.splits["test"]) == 2
    assert "the file has no validation split: the last 1 of 3 training dialogues are it" in data.notes


def test_sets_lists_and_missing_modalities(tmp_path):
    content = _content()
    content[7] = {"Ses03", "Ses01", "Ses02"}
    content[3]["Ses01"] = np.array(content[3]["Ses01"]).tolist()  # lists of numbers instead of arrays
    content[5]["Ses01"][1][:] = 0
    data = _load(tmp_path, content)
    assert data.splits["train"].extras["dialogue"].tolist() == [0] * 3 + [1] * 2  # sorted: Ses01, Ses02
    assert data.splits["train"].lengths["video"].tolist() == [1, 0, 1, 1, 1]


def test_speakers_of_meld_are_rows_with_a_one(tmp_path):
    content = _content(meld=True)
    for dialogue, n in COUNTS.items():
        content[1][dialogue] = np.eye(9, dtype=int)[[8, 0, 3, 8][:n]].tolist()
    assert _load(tmp_path, content).splits["train"].extras["speaker"].tolist() == [8, 0, 3, 8, 8, 0, 3]


@pytest.mark.parametrize("speakers", [2, 4])
def test_dialogues_are_written_as_they_are(tmp_path, speakers):
    data = make_dialogues(0, n_train=18, n_valid=2, n_test=3, max_length=8, speakers=speakers, missing_share=0.2)
    FORMATS["mmgcn"].write(data, tmp_path / "d.pkl")
    back = load(tmp_path / "d.pkl")
    assert len(pickle.loads((tmp_path / "d.pkl").read_bytes())) == 9
    assert back.label_names == data.label_names
    for name, split in data.splits.items():
        for extra in ("dialogue", "position", "speaker"):
            assert np.array_equal(back.splits[name].extras[extra], split.extras[extra])
        assert np.array_equal(back.splits[name].labels, split.labels)
        for modality, lengths in split.lengths.items():
            assert np.array_equal(back.splits[name].lengths[modality], np.minimum(lengths, 1))


def test_written_from_sequences(tmp_path):
    data = make_synthetic(0, n_train=25, n_valid=10, n_test=10, max_length=8)
    FORMATS["mmgcn"].write(data, tmp_path / "d.pkl")
    back = load(tmp_path / "d.pkl")
    joined = np.concatenate([back.splits[s].features["audio"][:, 0] for s in ("train", "valid")])
    for row, (split, i) in ((0, ("train", 0)), (24, ("train", 24)), (25, ("valid", 0))):
        features, length = data.splits[split].features["audio"][i], data.splits[split].lengths["audio"][i]
        np.testing.assert_allclose(joined[row], features[:length].mean(axis=0), rtol=1e-4, atol=1e-5)
    test = data.splits["test"].labels
    first = dict(enumerate(["joy", "sadness", "anger", "surprise", "disgust", "fear"]))
    for labels, got in zip(test, back.splits["test"].labels.argmax(axis=1), strict=True):
        expected = first[int(labels.argmax())] if labels.any() else "neutral"
        assert back.label_names[got] == expected


WRONG = {
    "count": (lambda c: c.pop(), r"expected a tuple of 9 \(videoIDs, .*\) or 10; got tuple of 8"),
    "part": (lambda c: c.__setitem__(3, [1]), "videoText: expected a dict of dialogues; got list of 1"),
    "dialogue lists": (lambda c: c.__setitem__(8, "Ses04"), "testVid: expected a list of dialogue ids; got str"),
    "unknown dialogue": (lambda c: c[8].append("Ses09"), "testVid: dialogue 'Ses09' is not in videoLabels"),
    "one dialogue": (lambda c: c.__setitem__(7, ["Ses01"]), "trainVid: expected two dialogues or more"),
    "labels": (lambda c: c[2].update(Ses04=["a", "b"]), "videoLabels of 'Ses04': expected a list of class numbers"),
    "class": (lambda c: c[2].update(Ses04=[0, -1]), r"videoLabels: expected class numbers in \[0, 6\); got -1"),
    "huge class": (lambda c: c[2].update(Ses04=[0, 10**6]), "videoLabels: expected class numbers from 0 to 99"),
    "no utterance": (lambda c: c[2].update(Ses04=[]), "videoLabels: expected an utterance in every split"),
    "speakers": (lambda c: c[1].pop("Ses04"), "videoSpeakers of 'Ses04': expected 2 speakers, .*; got NoneType"),
    "speaker": (lambda c: c[1].update(Ses04=["M", "X"]), "videoSpeakers of 'Ses04': expected 2 speakers, .*; got 'X'"),
    "speaker kind": (lambda c: c[1].update(Ses04=["M", 1]), "videoSpeakers of 'Ses04': .*; got list of 2"),
    "speaker row": (
        lambda c: c[1].update(Ses04=[[1, 0], [1, 1]]),
        "videoSpeakers of 'Ses04': .*; got float64 of",
    ),
    "vectors": (lambda c: c[3].pop("Ses04"), "videoText of 'Ses04': expected 2 vectors; got NoneType"),
    "vector count": (lambda c: c[3]["Ses04"].pop(), "videoText of 'Ses04': expected 2 vectors, as many as labels"),
    "vector size": (
        lambda c: c[3]["Ses04"].__setitem__(1, np.ones(4)),
        "videoText of 'Ses04': expected 2 vectors of one",
    ),
    "D": (
        lambda c: c[3].update(Ses01=[np.ones(4)] * 3),
        "videoText of 'Ses01': expected 5 features; got 4",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused(tmp_path, case):
    content = _content()
    damage, message = WRONG[case]
    damage(content)
    with pytest.raises(DataError, match=message):
        _load(tmp_path, tuple(content))

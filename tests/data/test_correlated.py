from __future__ import annotations

import numpy as np
import pytest

from mmer_fast.data import DataError, load
from mmer_fast.data.correlated import FEATURES, make_correlated
from mmer_fast.data.synthetic import PREVALENCE


def test_correlated_modalities_show_one_state():
    """What is left of a modality when the others are known linearly is its own noise."""
    data = make_correlated(0, n_valid=1, n_test=1)
    train = data.splits["train"]
    assert data.modalities == FEATURES
    assert np.allclose(train.labels.mean(axis=0), PREVALENCE, atol=0.05)
    assert all(np.array_equal(train.lengths["text"], lengths) for lengths in train.lengths.values())
    means = {name: x.sum(axis=1) / train.lengths[name][:, None] for name, x in train.features.items()}
    others = np.concatenate([means["video"], means["audio"]], axis=1)
    fit = np.linalg.lstsq(others, means["text"], rcond=None)[0]
    left = ((means["text"] - others @ fit) ** 2).mean() / (means["text"] ** 2).mean()
    assert left < 0.15


def test_labels_are_as_frequent_as_stated():
    labels = make_correlated(3, n_train=20_000, n_valid=1, n_test=1, max_length=1).splits["train"].labels
    assert np.allclose(labels.mean(axis=0), PREVALENCE, atol=0.005)


def test_the_state_wanders_as_far_at_the_end_as_at_the_start():
    """Without noise a feature has the variance of s A, 1 on average, and 0.7² of the process."""
    train = make_correlated(0, n_train=2000, n_valid=1, n_test=1, max_length=20, noise=0.0).splits["train"]
    variances = np.concatenate([x[:, :10].var(axis=0) for x in train.features.values()], axis=1).mean(axis=1)
    assert np.allclose(variances, 1 + 0.7**2, rtol=0.1)


def test_only_the_test_split_is_spoilt():
    data = make_correlated(1, n_train=20, n_valid=20, n_test=20, noisy_share=0.5, missing_share=0.25)
    assert "shift" not in data.splits["train"].extras
    assert np.bincount(data.splits["test"].extras["shift"]).tolist() == [5, 10, 5]
    again = make_correlated(1, n_train=20, n_valid=5, n_test=5)
    assert np.array_equal(again.splits["train"].features["audio"], data.splits["train"].features["audio"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed: expected at least 0"),
        ({"n_valid": 0}, "n_valid: expected at least 1; got 0"),
        ({"max_length": 0}, "max_length: expected at least 1; got 0"),
        ({"noise": -1.0}, "noise: expected a finite value >= 0"),
        ({"noisy_share": 2.0, "n_train": 1, "n_valid": 1, "n_test": 1}, "noisy_share, missing_share"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(DataError, match=message):
        make_correlated(**arguments)


def test_they_are_there_by_name():
    assert load("correlated", modalities=["audio"]).modalities == {"audio": 74}

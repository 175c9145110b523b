from __future__ import annotations

import numpy as np
import pytest

from mmer_fast.data import DataError, make_synthetic
from mmer_fast.data.ineffectual import make_ineffectual


@pytest.fixture(scope="module")
def split():
    return make_synthetic(0, n_train=1, n_valid=1, n_test=40, uninformative_share=0, missing_share=0).splits["test"]


def test_shares_of_the_samples_are_noisy_and_missing(split):
    spoilt = make_ineffectual(split, noisy_share=0.5, missing_share=0.25, scale=10.0)
    shift, chosen = spoilt.extras["shift"], spoilt.extras["ineffectual"]
    assert np.bincount(shift).tolist() == [10, 20, 10]
    assert np.array_equal(chosen == -1, shift == 0)
    assert set(chosen) == {-1, 0, 1, 2}
    for m, name in enumerate(split.features):
        before, after = split.features[name], spoilt.features[name]
        noisy, missing = (chosen == m) & (shift == 1), (chosen == m) & (shift == 2)
        same = ~noisy & ~missing
        assert np.array_equal(after[same], before[same])
        assert not after[missing].any()
        assert np.array_equal(spoilt.lengths[name], np.where(missing, 0, split.lengths[name]))
        used = np.arange(before.shape[1]) < split.lengths[name][:, None]
        added = (after - before)[used & noisy[:, None]]
        assert not after[~used].any()
        assert np.allclose(added.std(axis=0), 10 * before[used].std(axis=0), rtol=0.35)
        assert np.abs(np.corrcoef(added[:, :2].T)[0, 1]) < 0.3


def test_nothing_of_the_split_is_changed(split):
    before = {name: x.copy() for name, x in split.features.items()}
    extras = {name: x.copy() for name, x in split.extras.items()}
    spoilt = make_ineffectual(split, noisy_share=1.0)
    assert all(np.array_equal(split.features[name], x) for name, x in before.items())
    assert set(split.extras) == set(extras)
    assert all(np.array_equal(split.extras[name], x) for name, x in extras.items())
    assert not np.array_equal(spoilt.extras["shift"], extras["shift"])
    again, other = make_ineffectual(split, noisy_share=1.0), make_ineffectual(split, noisy_share=1.0, seed=1)
    assert all(np.array_equal(again.features[name], spoilt.features[name]) for name in before)
    assert any(not np.array_equal(other.features[name], spoilt.features[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noisy_share": 0.7, "missing_share": 0.4}, "with a sum of at most 1; got 0.7 and 0.4"),
        ({"missing_share": -0.1}, "noisy_share, missing_share: expected values >= 0"),
        ({"scale": float("inf")}, "scale: expected a finite value >= 0; got inf"),
        ({"seed": -1}, "seed: expected at least 0; got -1"),
    ],
)
def test_arguments_out_of_range_are_named(split, arguments, message):
    with pytest.raises(DataError, match=message):
        make_ineffectual(split, **arguments)

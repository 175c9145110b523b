from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmer_fast.data import large_arrays
from mmer_fast.data.large_arrays import blocks
from mmer_fast.data.padding import derive_lengths, undo_front_padding, zero_past_lengths


def test_padding_in_front_is_removed_and_interior_zeros_kept():
    x = np.zeros((4, 5, 2), np.float32)
    x[0, 2:] = [[1, 0], [0, 0], [0, 3]]  # two rows of padding, a zero row inside
    x[1, :2] = [[5, 5], [6, 6]]  # padding behind
    x[3] = 7  # none
    before = x.copy()
    trimmed, lengths, moved = derive_lengths(x)
    assert moved
    assert lengths.tolist() == [3, 2, 0, 5]
    assert trimmed[0].tolist() == [[1, 0], [0, 0], [0, 3], [0, 0], [0, 0]]
    assert np.array_equal(trimmed[1:], before[1:])
    assert np.array_equal(x, before)


def test_nothing_moves_without_padding_in_front():
    x = np.ones((2, 3, 1), np.float32)
    x[0, 2:] = 0
    trimmed, lengths, moved = derive_lengths(x)
    assert trimmed is x
    assert not moved
    assert lengths.dtype == np.int64


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5))
def test_trimming_keeps_every_row_between_the_first_and_the_last(used):
    used = np.array(used)
    x = np.where(used, np.arange(1, 7), 0)[:, :, None].astype(np.float32)
    trimmed, lengths, _ = derive_lengths(x)
    for row, out, length in zip(x, trimmed, lengths, strict=True):
        assert out[:length, 0].tolist() == np.trim_zeros(row[:, 0]).tolist()
        assert not out[length:].any()


def test_blocks_cover_every_sample_once(monkeypatch):
    monkeypatch.setattr(large_arrays, "BLOCK_BYTES", 100)
    x = np.zeros((7, 3, 5), np.float32)  # 60 bytes a sample
    assert [i for block in blocks(x) for i in range(7)[block]] == list(range(7))
    assert list(blocks(x[:0])) == []


def test_the_size_of_blocks_does_not_show(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 5, 2)).astype(np.float32) * rng.integers(0, 2, size=(9, 5, 1))
    lengths = rng.integers(0, 6, size=9)
    whole = derive_lengths(x), zero_past_lengths(x.copy(), lengths)
    monkeypatch.setattr(large_arrays, "BLOCK_BYTES", 1)
    small = derive_lengths(x), zero_past_lengths(x.copy(), lengths)
    for a, b in zip(whole, small, strict=True):
        for one, other in zip(a, b, strict=True):
            assert np.array_equal(one, other)


def test_given_lengths_with_padding_in_front():
    x = np.zeros((4, 5, 1), np.float32)
    x[0, 3:, 0] = [1, 2]  # in front: moved
    x[1, :2, 0] = [3, 4]  # behind
    x[2, 1:, 0] = [0, 5, 6, 7]  # length 2 of values that go on: not a case of padding in front
    lengths = np.array([2, 2, 2, 0])
    moved, any_moved = undo_front_padding(x, lengths)
    assert any_moved
    assert moved[:3, :, 0].tolist() == [[1, 2, 0, 0, 0], [3, 4, 0, 0, 0], [0, 0, 5, 6, 7]]
    assert undo_front_padding(x[1:], lengths[1:])[0] is not None
    assert not undo_front_padding(x[1:], lengths[1:])[1]


def test_read_only_features_are_copied_only_where_they_change():
    x = np.ones((2, 3, 1), np.float32)
    x.flags.writeable = False
    same, dirty = zero_past_lengths(x, np.array([3, 3]))
    assert same is x
    assert not dirty
    changed, dirty = zero_past_lengths(x, np.array([3, 1]))
    assert dirty
    assert changed[:, :, 0].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert x.all()

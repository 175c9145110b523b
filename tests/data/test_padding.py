from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmer_fast.data.padding import derive_lengths


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

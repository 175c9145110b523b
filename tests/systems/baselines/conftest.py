"""The ragged batch."""

from __future__ import annotations

import pytest
from small_baselines import ragged_batch

from mmer_fast.data import Batch


@pytest.fixture
def batch() -> Batch:
    return ragged_batch()

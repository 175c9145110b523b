"""What the tests of the modules run under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import mmer_fast as mf


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    """The backend whose float64 is compared with PyTorch's own modules."""
    with mf.use_backend("reference"):
        yield


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """Every test compiles from scratch: what other modules of the same code left counts against a limit."""
    torch._dynamo.reset()

"""`backend` and `device`: every test that takes them runs on each backend that this machine has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mmer_fast.ops import _backends


def _device_of(backend: str) -> str:
    if backend == "cuda" or (backend in ("triton", "reference") and torch.cuda.is_available()):
        return "cuda"
    return "cpu"


@pytest.fixture(
    params=[
        "reference",
        "cpu",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param
    reason = _backends.unavailable_reason(name, _device_of(name))
    if reason is None and _device_of(name) == "cuda" and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    # Triton's interpreter computes with NumPy, which would warn where a GPU's arithmetic overflows in silence.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)  # of its maximum
        yield name


@pytest.fixture
def device(backend: str) -> str:
    return _device_of(backend)


@pytest.fixture
def interpreted(backend: str, device: str) -> bool:
    """Whether this runs in Triton's interpreter, which is thousands of times slower: tests choose smaller inputs."""
    return backend == "triton" and device == "cpu"

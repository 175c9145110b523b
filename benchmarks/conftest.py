"""What the files for pytest-benchmark share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measure_entry(benchmark: Any) -> Callable[[Any, str, Any], None]:
    """Times what `enter` returned for a contestant: skips one that does not take part, fails if that is one of ours."""

    def measure(contestant: Any, group: str, entry: Any) -> None:
        if isinstance(entry, str):
            assert contestant.backend is None, entry
            pytest.skip(entry)
        benchmark.group = group
        errors = ("value_error", "gradient_error", "changed")
        benchmark.extra_info.update({name: getattr(entry, name) for name in errors if hasattr(entry, name)})
        if entry.seconds > 0.5:
            benchmark.pedantic(entry.call, rounds=2)
        else:
            benchmark(entry.call)

    return measure

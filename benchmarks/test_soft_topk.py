"""The case table under pytest-benchmark: ``pytest benchmarks/`` (CPU; slow, and no part of the tests).

Ratios that count come from `benchmarks.run`, where the contestants take turns; this is for a look at one of them, e.g.
``pytest benchmarks/ -k "64x500 and mmer_fast"``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.soft_topk import cases, measure, peers
from benchmarks.soft_topk.cases import Case, Inputs
from benchmarks.soft_topk.peers import Contestant

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (pip install 'mmer_fast[bench]')")
pytestmark = pytest.mark.filterwarnings("default")  # peers may use what torch deprecates


@pytest.fixture(autouse=True, scope="module")
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _problem(case: Case) -> tuple[Inputs, measure.Truth]:
    inputs = cases.build(case, "cpu")
    return inputs, measure.solve_reference(case, inputs)


@pytest.mark.parametrize("contestant", peers.select("cpu"), ids=lambda contestant: contestant.name)
@pytest.mark.parametrize("step", [harness.FORWARD, harness.FORWARD_BACKWARD])
@pytest.mark.parametrize("case", cases.select("cpu"), ids=lambda case: case.name)
def test_soft_topk(benchmark: Any, case: Case, step: str, contestant: Contestant) -> None:
    inputs, truth = _problem(case)
    entry = measure.enter(contestant, case, inputs, truth, step)
    if isinstance(entry, str):
        assert contestant.backend is None, entry
        pytest.skip(entry)
    benchmark.group = f"{case.name} {step}"
    benchmark.extra_info.update(value_error=entry.value_error, gradient_error=entry.gradient_error)
    if entry.seconds > 0.5:
        benchmark.pedantic(entry.call, rounds=2)
    else:
        benchmark(entry.call)

"""The case table under pytest-benchmark: ``pytest benchmarks/`` (CPU; slow, and no part of the tests).

Ratios that count come from `benchmarks.run`, where the contestants take turns; this is for a look at one of them, e.g.
``pytest benchmarks/ -k "64x500 and mmer_fast"``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest

from benchmarks.case_table import SOFT_TOPK
from mmer_fast.bench import harness
from mmer_fast.bench.soft_topk import cases, measure, peers
from mmer_fast.bench.soft_topk.cases import Case, Inputs
from mmer_fast.bench.soft_topk.peers import Contestant

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (pip install 'mmer_fast[bench]')")
pytestmark = pytest.mark.filterwarnings("default")  # peers may use what torch deprecates


@lru_cache(maxsize=1)
def _problem(case: Case) -> tuple[Inputs, measure.Truth]:
    inputs = cases.build(case, "cpu")
    return inputs, measure.solve_reference(case, inputs)


@pytest.mark.parametrize("contestant", peers.select("cpu"), ids=lambda contestant: contestant.name)
@pytest.mark.parametrize("step", [harness.FORWARD, harness.FORWARD_BACKWARD])
@pytest.mark.parametrize("case", SOFT_TOPK["cpu"], ids=lambda case: case.name)
def test_soft_topk(measure_entry: Callable[..., None], case: Case, step: str, contestant: Contestant) -> None:
    inputs, truth = _problem(case)
    entry = measure.enter(contestant, case, inputs, truth, step)
    measure_entry(contestant, f"{case.name} {step}", entry)

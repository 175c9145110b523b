"""The case table of attention under pytest-benchmark: ``pytest benchmarks/`` (CPU; slow, and no part of the tests).

Ratios that count come from `benchmarks.run`, where the contestants take turns; this is for a look at one of them, e.g.
``pytest benchmarks/ -k "L150-fp32 and mmer_fast"``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest

from benchmarks.case_table import ATTENTION
from mmer_fast.bench import harness
from mmer_fast.bench.attention import cases, measure, peers
from mmer_fast.bench.attention.cases import Case, Inputs
from mmer_fast.bench.attention.contestants import PLAIN, Contestant

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (pip install 'mmer_fast[bench]')")
pytestmark = pytest.mark.filterwarnings("default")  # peers may use what torch deprecates


@lru_cache(maxsize=1)
def _inputs(case: Case) -> Inputs:
    return cases.build(case, "cpu")


@lru_cache(maxsize=2)
def _truth(case: Case, weighted: bool) -> measure.Truth:
    return measure.solve_reference(_inputs(case), weighted)


@pytest.mark.parametrize("contestant", peers.select("cpu"), ids=lambda contestant: contestant.name)
@pytest.mark.parametrize("step", [harness.FORWARD, harness.FORWARD_BACKWARD])
@pytest.mark.parametrize("case", ATTENTION["cpu"], ids=lambda case: case.name)
def test_attention(measure_entry: Callable[..., None], case: Case, step: str, contestant: Contestant) -> None:
    if not contestant.serves(case):
        pytest.skip("not for this kind of batch")
    truth = _truth(case, contestant.task != PLAIN)
    entry = measure.enter(contestant, case, _inputs(case), truth, step)
    measure_entry(contestant, f"{case.name} {step}", entry)

"""The case table of the weight perturbation under pytest-benchmark: ``pytest benchmarks/`` (CPU; no part of the tests).

Ratios that count come from `benchmarks.run`, where the contestants take turns; this is for a look at one of them, e.g.
``pytest benchmarks/ -k "1000x512 and mmer_fast"``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
from torch import Tensor

from benchmarks.case_table import PERTURBATION
from mmer_fast.bench.perturbation import cases, measure, peers
from mmer_fast.bench.perturbation.cases import CYCLE, Case, Inputs
from mmer_fast.bench.perturbation.contestants import Contestant

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (pip install 'mmer_fast[bench]')")
pytestmark = pytest.mark.filterwarnings("default")  # peers may use what torch deprecates


@lru_cache(maxsize=1)
def _problem(case: Case) -> tuple[Inputs, list[Tensor]]:
    inputs = cases.build(case, "cpu")
    return inputs, measure.solve_reference(inputs)


@pytest.mark.parametrize("contestant", peers.select("cpu"), ids=lambda contestant: contestant.name)
@pytest.mark.parametrize("case", PERTURBATION["cpu"], ids=lambda case: case.name)
def test_perturbation(measure_entry: Callable[..., None], case: Case, contestant: Contestant) -> None:
    if not contestant.serves(case):
        pytest.skip("not for this kind of step")
    entry = measure.enter(contestant, case, *_problem(case))
    measure_entry(contestant, f"{case.name} {CYCLE}", entry)

"""How `benchmarks.run` and `benchmarks.report` see the benchmark of an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bars import Promise
from mmer_fast.bench import timing
from mmer_fast.bench.harness import Row


@dataclass(frozen=True)
class Operator:
    """The benchmark of one operator.

    Attributes:
        name: as in the rows and in the markers of its page.
        cases: names of the cases of a device type, in the order of the table.
        contestants: names of the contestants of a device type.
        measure: (case, parts of contestants' names or None, device, plan) -> rows of the case.
        show: prints the rows of a case.
        section: (result, device) -> what stands between the markers.
        draw: (result, path of a PNG); imports matplotlib.
        bars: what it promises on a device type.
        packages: distributions whose versions a result has.
        page: the file with the markers, from the root of the repository.
    """

    name: str
    cases: Callable[[str], list[str]]
    contestants: Callable[[str], list[str]]
    measure: Callable[[str, list[str] | None, str, timing.Plan], list[Row]]
    show: Callable[[list[Row]], None]
    section: Callable[[dict[str, Any], str], str]
    draw: Callable[[dict[str, Any], Path], Path]
    bars: Mapping[str, Sequence[Promise]]
    packages: tuple[str, ...]
    page: str = "README.md"

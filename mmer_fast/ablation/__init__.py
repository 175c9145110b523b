"""Ablations of RobMMR: every row of the paper's Table 2 and Figures 4 and 5, trained side by side over several seeds.

    run_suite   train what is missing of a suite; write its tables and plots
    SUITES      the rows as data; your own `Suite` of `Row`s runs the same way

`suites` says what a row changes, `plan` what that means for a preset and a data set, `runner` trains, `results` counts,
`document` writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmer_fast.ablation.suites import SUITES, Row, Suite

if TYPE_CHECKING:
    from mmer_fast.ablation.api import run_suite

__all__ = ["SUITES", "Row", "Suite", "run_suite"]


def __getattr__(name: str) -> Any:
    """`run_suite`, imported when it is asked for: workers do without what draws and writes."""
    if name == "run_suite":
        from mmer_fast.ablation import api

        return api.run_suite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

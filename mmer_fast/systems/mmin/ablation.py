"""MMIN's ablation study as a suite for `mmer_fast.ablation.run_suite`: the rows of the talk's tables.

Its tables and plots are about the data as they are. What each row recognises where modalities are missing is the table
of `mmer-fast evaluate --conditions`, and what the talk publishes for that is in `mmer_fast.systems.mmin.published`.
"""

from __future__ import annotations

from mmer_fast.ablation import Row, Suite
from mmer_fast.systems.mmin.config import ABLATIONS

ABLATION = Suite(
    "mmin",
    "MMIN: imagination, cycle consistency, baselines",
    tuple(Row(name, name.lower().replace(" ", "-"), model, system="mmin") for name, model in ABLATIONS.items()),
)

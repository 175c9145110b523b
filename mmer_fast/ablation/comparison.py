"""Systems side by side: a suite with a row for each, on the same data, seeds and settings of the loop."""

from __future__ import annotations

from collections.abc import Sequence

from mmer_fast.ablation.suites import Row, Suite
from mmer_fast.training.run import RunError
from mmer_fast.training.settings import named_system

NAME = "compare"


def comparison(models: Sequence[str]) -> Suite:
    """The suite of these systems, each in its preset; the first is the one that the others are compared with.

    Args:
        models: some of `mmer_fast.systems.registry.NAMES`, each once.

    Raises:
        RunError: a name is unknown or given twice, or there is none.
    """
    if not models or len(set(models)) != len(models):
        raise RunError(f"models must be one or more different names, got {', '.join(models) or 'none'}")
    return Suite(NAME, "Systems compared", tuple(Row(named_system(name).title, name, system=name) for name in models))

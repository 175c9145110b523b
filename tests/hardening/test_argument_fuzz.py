"""Arbitrary arguments of operators, modules and SAM give an error that names one, or what the reference does.

That is the result, and the gradients within what rounding can do to them.

`make fuzz` searches longer. run_argument_fuzz.py is a process of its own, so that a crash is a failure with a message.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import argument_strategies
import module_strategies
import pytest
import weight_strategies
from argument_strategies import STRATEGIES
from fuzzing import TIMES

import mmer_fast as mf

HERE = Path(__file__).parent
SECONDS = 300 * max(TIMES, 1)  # it takes 20


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What was wrong with each of STRATEGIES; a crash or a hang fails all of them, with the call that did it."""
    last = tmp_path_factory.mktemp("fuzz") / "last.txt"
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "run_argument_fuzz.py"), str(last)]
    try:
        run = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end within {SECONDS} s, at {last.read_text()}") from None
    assert run.returncode == 0, f"status {run.returncode} at {last.read_text()}\n{run.stderr[-4000:]}"
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", STRATEGIES)
def test_arguments(problems: dict[str, str | None], name: str) -> None:
    assert problems[name] is None, problems[name]


def test_everything_public_is_among_them() -> None:
    files = (argument_strategies, module_strategies, weight_strategies)
    source = "".join(map(inspect.getsource, files))
    functions = {f"mf.{name}" for name in mf.__all__ if inspect.isfunction(getattr(mf, name))}
    functions -= {"mf.backends", "mf.checked", "mf.use_backend"}  # settings
    functions -= {"mf.perturb_", "mf.release_stash"}  # the split form of mf.perturbed, and what takes no numbers
    others = {f"ops.{name}" for name in mf.ops.__all__} | {f"mf.nn.{name}" for name in mf.nn.__all__} | {"mf.optim.SAM"}
    missing = {name for name in functions | others if not re.search(rf"{re.escape(name)}(?!\w)", source)}
    assert not missing

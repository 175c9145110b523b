"""Arbitrary arguments of the public operators give an error that names one of them, or what the reference gives.

`make fuzz` searches longer. run_argument_fuzz.py is a process of its own, so that a crash is a failure with a message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from argument_strategies import STRATEGIES
from fuzzing import TIMES

HERE = Path(__file__).parent
SECONDS = 300 * max(TIMES, 1)  # it takes 10


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What was wrong with each operator; a crash or a hang fails all of them, with the call that did it."""
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

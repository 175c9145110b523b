"""Operators in forked processes whose parent has used them: the same bits, and an end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_forked_calls.py")
SECONDS = 90  # it takes 4


@pytest.mark.parametrize("kind", ["loader", "fork"])
def test_calls_after_a_fork(kind: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(SCRIPT), kind]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
            raise AssertionError(f"no end within {SECONDS} s: a deadlock after the fork") from None
    assert process.returncode == 0, errors

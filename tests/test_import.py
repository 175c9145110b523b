"""What `import mmer_fast` costs on top of `import torch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, sys, time
start = time.process_time()
import torch
between, before = time.process_time(), set(sys.modules)
import mmer_fast
end = time.process_time()
added = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"torch": between - start, "mmer_fast": end - between, "added": added}))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Seconds of processor time, and the top-level modules that came: of six processes, the first of which compiles."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = {
        **kept,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode")),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", PROGRAM]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(6)]
    return [json.loads(run.stdout) for run in runs[1:]]


def test_nothing_else_is_imported(imports: list[dict[str, Any]]) -> None:
    standard = set(sys.stdlib_module_names)
    for measured in imports:
        assert set(measured["added"]) - standard == {"mmer_fast"}


def test_time(imports: list[dict[str, Any]]) -> None:
    """At most 50 ms where torch takes a second, as on the machine this was measured on: a ratio, for slower ones."""
    ours, torchs = (min(measured[name] for measured in imports) for name in ("mmer_fast", "torch"))
    assert ours < max(0.05, 0.05 * torchs), (ours, torchs)

"""Half weights move to the bits that float64 gives, although the CPU computes most of them in float: all weights, many
gradients, ties above all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmer_fast import _extension

pytestmark = pytest.mark.skipif(_extension.unavailable_reason() is not None, reason="the compiled library is not there")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_half_weights_move_to_the_bits_of_float64(isa: str) -> None:
    script = Path(__file__).with_name("run_perturbation_halves.py")
    environment = {**os.environ, "MMER_FAST_CPU_ISA": isa}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    if report["isa"] != isa:
        pytest.skip(f"this CPU has no {isa}: the best that it can run is {report['isa']}")
    assert not report["wrong"], "\n".join(report["wrong"][:20])
    assert report["entries"] > 10_000_000
    assert report["ties"] > 100_000

"""The README's example runs as it stands there, and its table comes from the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs(capsys):
    (code,) = re.findall(r"<!-- example.*?-->\n```python\n(.*?)```\n<!-- /example -->", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["scores"].grad.isfinite().all()
    assert names["weights"].sum(-1).sub(40).abs().max() < 1e-3
    assert "tensor(" in capsys.readouterr().out


def test_the_measured_table_is_there():
    (table,) = re.findall(r"<!-- benchmark:soft_topk:cpu -->\n(.*?)<!-- /benchmark -->", README, flags=re.DOTALL)
    assert "| 64x500 |" in table, "run make bench"

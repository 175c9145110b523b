"""The README's example runs as it stands there, and its table comes from the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


EXAMPLES = re.findall(r"<!-- example.*?-->\n```python\n(.*?)```\n<!-- /example -->", README, flags=re.DOTALL)


def run(code: str) -> dict:
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_example_of_soft_topk_runs(capsys):
    names = run(EXAMPLES[0])
    assert names["scores"].grad.isfinite().all()
    assert names["weights"].sum(-1).sub(40).abs().max() < 1e-3
    assert "tensor(" in capsys.readouterr().out


def test_the_example_of_attention_runs():
    names = run(EXAMPLES[1])
    assert names["out"].shape == (names["lengths"].sum(), 4, 64)
    assert names["q"].grad.isfinite().all()
    assert (names["mask"].grad != 0).sum() == names["lengths"].sum()


def test_the_example_of_perturbation_runs():
    names = run(EXAMPLES[2])
    assert names["info"].names == ("weight",)
    assert names["info"].skipped.item() is False
    assert all(p.grad.isfinite().all() for p in names["model"].parameters())
    assert len(names["optimizer"].state_dict()["state"]) == 2


def test_the_measured_table_is_there():
    (table,) = re.findall(r"<!-- benchmark:soft_topk:cpu -->\n(.*?)<!-- /benchmark -->", README, flags=re.DOTALL)
    assert "| 64x500 |" in table, "run make bench"

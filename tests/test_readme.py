"""The README's examples compute what they say, and its table comes from the benchmarks."""

from __future__ import annotations

import re

from documented import ROOT, blocks, run_python

README = ROOT / "README.md"
EXAMPLES = [block for block in blocks(README) if block.language == "python"]


def run(number: int) -> tuple[dict, str]:
    """The names that an example makes, and what it prints."""
    assert len([line for line in EXAMPLES[number].code.splitlines() if line.strip()]) <= 10
    names: dict = {}
    return names, run_python(EXAMPLES[number], names)


def test_the_example_of_soft_topk_runs():
    names, printed = run(0)
    assert names["scores"].grad.isfinite().all()
    assert names["weights"].sum(-1).sub(40).abs().max() < 1e-3
    assert "tensor(" in printed


def test_the_example_of_attention_runs():
    names, _ = run(1)
    assert names["out"].shape == (names["lengths"].sum(), 4, 64)
    assert names["q"].grad.isfinite().all()
    assert (names["mask"].grad != 0).sum() == names["lengths"].sum()


def test_the_example_of_perturbation_runs():
    names, _ = run(2)
    assert names["info"].names == ("weight",)
    assert names["info"].skipped.item() is False
    assert all(p.grad.isfinite().all() for p in names["model"].parameters())
    assert len(names["optimizer"].state_dict()["state"]) == 2


def test_the_measured_table_is_there():
    (table,) = re.findall(
        r"<!-- benchmark:soft_topk:cpu -->\n(.*?)<!-- /benchmark -->", README.read_text(), flags=re.DOTALL
    )
    assert "| 64x500 |" in table, "run make bench"

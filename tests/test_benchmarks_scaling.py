"""The sweeps: fits, the estimate, the page, and a tiny run from end to end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is no part of the wheel

import mmer_fast as mf
from benchmarks import report, run
from benchmarks.scaling import estimate, measure, sweeps, table
from benchmarks.scaling.fit import fit, upper_half
from mmer_fast.bench import ceilings, shapes, timing
from mmer_fast.bench.attention.cases import Case as AttentionCase
from mmer_fast.bench.perturbation.cases import Case as PerturbationCase
from mmer_fast.bench.perturbation.cases import Small
from mmer_fast.bench.soft_topk.cases import Case as SoftTopkCase

CEILINGS = {"copy_gbps": 10.0, "matmul_gflops": {"float32": 50.0, "bfloat16": 80.0}, "sweep": [{"gsigmoids": 0.5}]}
TINY = {
    "soft_topk-n": tuple((n, SoftTopkCase(str(n), 2, n)) for n in (10, 20, 40)),
    "attention-length": tuple((n, AttentionCase(str(n), 2, 1, 8, n)) for n in (4, 8, 16)),
    "perturbation-tensors": tuple((n, PerturbationCase(str(n), Small(n, 64 // n))) for n in (1, 2, 4)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_power_law_is_found_again() -> None:
    xs = [1.0, 3.0, 10.0, 40.0]
    law = fit(xs, [5 * x**1.7 for x in xs])
    assert (law.exponent, law.error) == pytest.approx((1.7, 0.0), abs=1e-9)
    noisy = fit([1.0, 10.0, 100.0], [1.0, 20.0, 100.0])  # residuals of -1, 2 and -1 thirds of log 2
    assert noisy.exponent == pytest.approx(1.0)
    assert noisy.error == pytest.approx(math.log(2) * math.sqrt(2 / 3) / math.sqrt(2) / math.log(10))
    assert str(noisy) == "1.00 ± 0.17"


def test_the_upper_half_leaves_the_fixed_cost_out() -> None:
    xs = [4.0**n for n in range(8)]
    ys = [100 + x for x in xs]
    assert fit(xs, ys).exponent < 0.6
    assert upper_half(xs, ys).exponent > 0.8
    assert upper_half([1.0, 2.0, 4.0, 8.0], [9.0, 1.0, 2.0, 4.0]).exponent == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("xs", "ys"),
    [
        ([1.0, 2.0], [1.0, 2.0]),
        ([1.0, 2.0, 2.0], [1.0, 2.0, 2.0]),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 0.0]),
        ([1.0, 2.0, 3.0], [1.0]),
    ],
)
def test_what_has_no_power_law_is_refused(xs: list[float], ys: list[float]) -> None:
    with pytest.raises(ValueError, match="three different x at least, got"):
        fit(xs, ys)


def test_the_estimate_carries_the_last_point_on() -> None:
    square = replace(sweeps.SWEEPS[0], counted=2)
    assert estimate.microseconds({"at": 10.0, "us": 30.0}, square, 20.0, 4) == pytest.approx(30.0)
    assert estimate.ceilings({"ceilings": CEILINGS}, 4) == "copy 40 GB/s, product 200 GFLOP/s, sigmoid 2 G/s"
    dtypes = {getattr(case, "dtype", estimate.DTYPE) for sweep in sweeps.SWEEPS for _, case in sweep.points}
    assert dtypes <= {estimate.DTYPE, "fp32"}


def test_sweeps_change_one_number_upwards() -> None:
    for sweep in sweeps.SWEEPS:
        ats = [at for at, _ in sweep.points]
        assert ats == sorted(ats)
        assert len(ats) == len(set(ats)) >= 6
        assert sweep.beyond is None or sweep.beyond > ats[-1]
        cases = [vars(case) for _, case in sweep.points]
        changing = {key for key in cases[0] if len({str(case[key]) for case in cases}) > 1} - {"name"}
        assert len(changing) == 1, sweep.name
        known = {contestant.name for contestant in shapes.OPERATORS[sweep.operator].select("cpu", None)}
        assert set(sweep.contestants) <= known
    assert measure.contestants(sweeps.SWEEPS[0], "cpu", ["nobody"]) == ["mmer_fast cpu"]


@pytest.fixture
def result() -> dict[str, Any]:
    """A made-up result of a sweep in which time is 2 x^1.5 microseconds."""
    sweep = sweeps.SWEEPS[0]
    rows = [
        {"operator": "scaling", "sweep": sweep.name, "case": f"{sweep.name} {at:g}", "at": at, "pass": sweep.step,
         "contestant": name, "ours": name == sweep.contestants[0], "status": "ok", "us": times * 2 * at**1.5,
         "us_min": at, "us_max": at, "ratio": times, "roofline": 0.25, "bound": "memory"}
        for at, _ in sweep.points
        for times, name in enumerate(sweep.contestants, 1)
    ]  # fmt: skip
    machine = {"cpu": "Example CPU", "threads": 2, "isa": "avx2", "gpu": None, "cuda": None}
    header = {"schema": 1, "created": "2025-01-02", "quick": False, "device": "cpu", "commit": "abc"}
    versions = {"torch": "2.13.0"}
    return {**header, "machine": machine, "ceilings": CEILINGS, "versions": versions, "rows": rows}


def test_the_page_says_what_the_rows_say(result: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "docs" / "scaling.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- benchmark:scaling:cpu -->\n<!-- /benchmark -->\nafter\n")
    (tmp_path / "a.json").write_text(json.dumps(result))
    assert report.main(["--results", str(tmp_path), "--root", str(tmp_path)]) == 0
    text = page.read_text()
    assert (
        "| soft_topk | scores of a row, n; 64 rows | 64, 65,536 | 1.02 ms, 33.6 s | 1.50 ± 0.00 | 1.50 ± 0.00 | 1 |"
        in text
    )
    assert "25 %, 25 % (memory) |" in text
    assert "**Estimated, not measured**" in text
    assert "| 4x: copy 40 GB/s, product 200 GFLOP/s, sigmoid 2 G/s |" in text
    assert "scores of a row, n: 1,000,000; 64 rows | memory | 512 s | 128 s | 32.0 s |" in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- /benchmark -->\nafter\n")
    assert (tmp_path / "scaling_cpu.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "index.html").read_text()
    assert "Time of a call" not in html
    assert "soft_topk: time of a call and share of the roofline over scores of a row, n, 64 rows" in html


@pytest.mark.skipif(mf.backends()["soft_topk"]["cpu"] != "available", reason="the compiled library is not built")
def test_a_tiny_run_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tuple(replace(sweep, points=TINY[sweep.name]) for sweep in sweeps.SWEEPS if sweep.name in TINY)
    for module in (sweeps, measure, table):
        monkeypatch.setattr(module, "SWEEPS", tiny)
    monkeypatch.setitem(timing.PLANS, "quick", {"cpu": timing.Plan(rounds=2, turn_s=0.001, budget_s=0.05)})
    monkeypatch.setattr(ceilings, "measure", lambda device: dict(CEILINGS))
    monkeypatch.setattr(ceilings, "MATMUL_SIZE", {"cpu": 16})
    monkeypatch.setattr(ceilings, "COPY_ENTRIES", {"cpu": 1000})
    arguments = ["--operator", "scaling", "--quick", "--threads", "1", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert {row["operator"] for row in result["rows"]} == {"scaling"}
    for sweep in tiny:
        for name in sweep.contestants[:2]:
            rows = table.points(result, sweep, name)
            assert [row["at"] for row in rows] == [at for at, _ in sweep.points], (sweep.name, name)
            assert all(row["roofline"] > 0 for row in rows)
    assert "perturbation-tensors  cycle" in capsys.readouterr().out
    assert table.section(result, "cpu").count("| attention | length, L") == 2

"""`mmer-fast bench`: a tiny run of each operator on shapes from the command line, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mmer_fast as mf
from mmer_fast import cli
from mmer_fast.bench import ceilings, counters, machine, timing
from mmer_fast.bench.commands import PlanName
from mmer_fast.bench.shapes import OPERATORS, ShapeError, read_case
from mmer_fast.bench.soft_topk import measure as soft_topk_measure

PLAN = timing.Plan(rounds=2, turn_s=0.001, budget_s=0.05)
CEILINGS = {"copy_gbps": 1.0, "matmul_gflops": {"float32": 2.0}, "sweep": [{"gsigmoids": 0.5}]}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setitem(timing.PLANS, "quick", {"cpu": PLAN})
    monkeypatch.setattr(ceilings, "measure", lambda device: CEILINGS)
    monkeypatch.setattr(ceilings, "MATMUL_SIZE", {"cpu": 16})
    monkeypatch.setattr(ceilings, "COPY_ENTRIES", {"cpu": 1000})
    yield
    torch.set_num_threads(before)


def bench(*arguments: object) -> int:
    options = ("--device", "cpu", "--plan", "quick", "--threads", 1)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *(str(argument) for argument in (*arguments, *options))])
    return int(exit_.value.code or 0)


needs_kernels = pytest.mark.skipif(
    mf.backends()["soft_topk"]["cpu"] != "available", reason="the compiled library is not built"
)


@needs_kernels
@pytest.mark.parametrize(
    ("op", "case", "dtype", "peer", "expected"),
    [
        ("soft_topk", "B=3,n=20,k=5,epsilon=0.05", "float32", "Newton, eager", {"rows": 3, "n": 20, "k": 5}),
        ("soft_topk", "B=3,n=20,k=5,ragged=1", "float32", "Newton, eager", {"ragged": True, "k": None}),
        ("attention", "B=3,H=2,L=12,D=8,padding=0.25", "bfloat16", "bool mask", {"batch": 3, "padding": 0.25}),
        ("perturbation", "tensors=7,size=11", "float16", "kept copies", {"tensors": 7, "entries": 77}),
    ],
)
def test_shapes_of_ones_own(
    op: str, case: str, dtype: str, peer: str, expected: dict[str, object], tmp_path: Path
) -> None:
    assert bench("--op", op, "--case", case, "--dtype", dtype, "--contestants", peer, "--out", tmp_path) == 0
    (path,) = tmp_path.glob("*-quick.json")
    result = json.loads(path.read_text())
    assert (result["plan"], result["quick"], result["ceilings"]) == ("quick", True, CEILINGS)
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    assert any(row["ours"] for row in rows)
    assert any(peer in row["contestant"] for row in rows)
    for row in rows:
        assert row["case"] == case
        assert expected.items() <= row.items()
        assert row["us_min"] <= row["us_p20"] <= row["us"] <= row["us_p80"] <= row["us_max"]
        if row["contestant"] not in ("copy", "torch.sigmoid", "torch.topk"):
            assert row["roofline"] == pytest.approx(row["floor_us"] / row["us"])
            assert row["extra_bytes"] > 0


@needs_kernels
def test_several_cases_are_one_result(tmp_path: Path) -> None:
    cases = ("--case", "B=2,n=9", "--case", "B=2,n=8,k=3")
    assert bench("--op", "soft_topk", *cases, "--contestants", "sigmoid", "--out", tmp_path) == 0
    (path,) = tmp_path.glob("*.json")
    assert {row["k"] for row in json.loads(path.read_text())["rows"]} == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "soft_topk", "--case", "B=4"), "must look like B=...,n=...[,k=...][,epsilon=...][,ragged=...], got"),
        (("--op", "soft_topk", "--case", "B=4,n"), "must look like B=...,n=...[,k=...]"),
        (("--op", "soft_topk", "--case", "B=4,n=5,width=3"), "got 'width=3'"),
        (("--op", "soft_topk", "--case", "B=4,n=5,n=6"), "n must be given once, got 'B=4,n=5,n=6'"),
        (("--op", "soft_topk", "--case", "B=4,n=five"), "n must be an integer of at least 2, got 'five'"),
        (("--op", "soft_topk", "--case", "B=0,n=5"), "B must be an integer of at least 1, got '0'"),
        (("--op", "soft_topk", "--case", "B=4,n=5,k=5"), "k must be below n, got k=5, n=5"),
        (("--op", "attention", "--case", "B=4,L=5,padding=1"), "at least 0 and at most 0.95, got '1'"),
        (("--op", "attention", "--case", "B=4,L=5,padding=nan"), "at least 0 and at most 0.95, got 'nan'"),
        (("--op", "soft_topk", "--case", "B=4,n=5", "--dtype", "float16"), "one of float32, bfloat16, got 'float16'"),
        (("--op", "soft_topk", "--case", "B=4,n=5", "--contestants", "nobody"), "--contestants: contestants must be"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("mmer-fast: error: --")
    assert printed.out == ""


@needs_kernels
def test_a_wrong_result_of_ours_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(soft_topk_measure.TOLERANCES, "float32", (0.0, 0.0))
    assert bench("--op", "soft_topk", "--case", "B=4,n=50", "--contestants", "sigmoid") == 1
    assert "expected errors within 0 (value)" in capsys.readouterr().err


def test_an_installation_without_a_kernel_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mf, "backends", lambda: {"soft_topk": {"cpu": "not built"}})
    assert bench("--op", "soft_topk", "--case", "B=4,n=50", "--contestants", "sigmoid") == 2
    assert "no backend of mmer_fast serves cpu: {'cpu': 'not built'}" in capsys.readouterr().err


def test_plans_have_the_names_of_the_option() -> None:
    assert [plan.value for plan in PlanName] == list(timing.PLANS)


def test_what_is_not_given_has_a_default() -> None:
    case = read_case(OPERATORS["attention"], "L=7,B=2", "float32")
    assert (case.batch, case.length, case.heads, case.width, case.padding, case.dtype) == (2, 7, 8, 64, 0.5, "fp32")
    assert read_case(OPERATORS["perturbation"], "tensors=2,size=3", "bfloat16").radius == 5.0
    with pytest.raises(ShapeError, match="epsilon must be a number of at least"):
        read_case(OPERATORS["soft_topk"], "B=2,n=3,epsilon=inf", "float32")


def test_an_installation_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() is None


def test_memory_of_a_slow_call_is_not_measured() -> None:
    assert counters.extra_bytes(lambda: torch.empty(1000), 0.1, "cpu") == 4000
    assert counters.extra_bytes(lambda: torch.empty(1000), 100.0, "cpu") is None

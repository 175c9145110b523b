"""The benchmark harness and its soft top-k: a tiny run from end to end, errors, the report of a made-up result."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmer_fast as mf

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is no part of the wheel

from benchmarks import bars, case_table, promises, report, run
from benchmarks.interface import Operator
from benchmarks.soft_topk.bars import CPU_BARS
from mmer_fast.bench import ceilings, harness, results, timing
from mmer_fast.bench.soft_topk import baselines, cases, measure, peers
from mmer_fast.bench.soft_topk.cases import Case
from mmer_fast.bench.soft_topk.peers import SAME_PLAN, Contestant

TINY, TINY_RAGGED = Case("tiny", 3, 20), Case("tiny-ragged", 4, 30, ragged=True)
TINY_PLAN = timing.Plan(rounds=2, turn_s=0.001, budget_s=0.05)
BACKEND = "cpu" if mf.backends()["soft_topk"]["cpu"] == "available" else "reference"
CEILINGS = {"copy_gbps": 1.0, "matmul_gflops": {"float32": 2.0}, "sweep": [{"gsigmoids": 0.5}]}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny problems gain nothing from threads, which stall on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny cases, no compiled peers, and the reference where the compiled library is not part of the installation."""
    pool = [c for c in peers.CONTESTANTS if c.name in ("copy", "torch.sigmoid", "torch.topk", "Newton, eager")]
    ours = Contestant("mmer_fast cpu", SAME_PLAN, lambda: peers._ours(BACKEND), backend=BACKEND, devices=("cpu",))
    absent = Contestant("absent", SAME_PLAN, lambda: baselines.newton, module="no_such_module_here")
    monkeypatch.setitem(case_table.SOFT_TOPK, "cpu", (TINY, TINY_RAGGED))
    monkeypatch.setattr(peers, "CONTESTANTS", (ours, *pool, absent))
    monkeypatch.setitem(timing.PLANS, "quick", {"cpu": TINY_PLAN})
    monkeypatch.setattr(ceilings, "measure", lambda device: dict(CEILINGS))


def _run(out: Path, *arguments: str) -> int:
    return run.main(
        ["--device", "cpu", "--operator", "soft_topk", "--quick", "--threads", "1", "--out", str(out), *arguments]
    )


def test_a_run_writes_rows_with_machine_versions_and_commit(tmp_path: Path) -> None:
    assert _run(tmp_path) == 0
    (path,) = tmp_path.glob("*-cpu-*-quick.json")
    result = json.loads(path.read_text())
    assert result["schema"] == results.SCHEMA
    assert result["quick"] is True
    assert {"cpu", "cores", "threads", "isa", "gpu", "copy_gbps"} <= result["machine"].keys()
    assert result["versions"]["torch"] == torch.__version__
    assert len(result["rows"]) == 2 * 2 * 6

    for row in result["rows"]:
        ragged = row["case"] == "tiny-ragged"
        expected = {"absent": "not installed"}
        if row["pass"] == harness.FORWARD_BACKWARD:
            expected["copy"] = "no gradient"
        if ragged:
            expected["torch.topk"] = "no ragged rows"
        assert row["status"] == expected.get(row["contestant"], "ok"), row
        if row["status"] == "ok":
            assert row["us_min"] <= row["us"] <= row["us_max"]
            assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        if row["ours"]:
            assert row["ratio"] == 1.0
            assert row["value_error"] < 2e-6


def test_a_second_run_gets_a_file_of_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        assert _run(tmp_path, "--cases", "tiny", "--contestants", "sigmoid") == 0
    assert len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize("what", ["value", "gradient", "nan"])
def test_a_wrong_result_of_ours_is_an_error_and_times_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = mf.soft_topk

    def wrong(scores: Tensor, k: int | Tensor, **options: Any) -> Tensor:
        weights = right(scores, k, **options)
        assert isinstance(weights, Tensor)
        if scores.dtype == torch.float64:  # the reference stays right
            return weights
        if what == "gradient":
            return weights.detach() + 1.001 * (weights - weights.detach())
        return weights + (1e-4 if what == "value" else torch.nan)

    monkeypatch.setattr(mf, "soft_topk", wrong)
    assert _run(tmp_path, "--cases", "tiny") == 1
    printed = capsys.readouterr()
    assert "mmer_fast cpu, tiny: expected errors within 2e-06" in printed.err
    assert "torch.sigmoid" not in printed.out
    assert not list(tmp_path.glob("*.json"))


def test_a_peer_that_raises_gives_a_row_that_says_so() -> None:
    def load() -> peers.Function:
        raise ImportError("libpeer.so: cannot open")

    inputs = cases.build(TINY, "cpu")
    truth = measure.solve_reference(TINY, inputs)
    peer = Contestant("peer", SAME_PLAN, load)
    assert measure.enter(peer, TINY, inputs, truth, harness.FORWARD) == "ImportError: libpeer.so: cannot open"
    ours = Contestant("ours", SAME_PLAN, load, backend=BACKEND)
    with pytest.raises(harness.WrongResultError, match=r"ours, tiny: raised ImportError: libpeer\.so"):
        measure.enter(ours, TINY, inputs, truth, harness.FORWARD)


@pytest.mark.parametrize("case", [TINY, TINY_RAGGED], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "solve",
    [
        baselines.newton,
        baselines.sinkhorn_log,
        baselines.sinkhorn_log_implicit,
        baselines.sinkhorn_exp_implicit,
    ],
)
def test_the_baselines_compute_the_same_plan(case: Case, solve: peers.Function) -> None:
    inputs = cases.build(case, "cpu")
    truth = measure.solve_reference(case, inputs)
    result = measure.make_call(solve, case, inputs, harness.FORWARD_BACKWARD)()
    value, gradient = measure.errors(result, truth, harness.FORWARD_BACKWARD)
    assert value < 1e-5
    assert gradient is not None
    assert gradient < 1e-4


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"case must be one of tiny, tiny-ragged, got '7x7'"):
        case_table.find(case_table.SOFT_TOPK["cpu"], "7x7")
    with pytest.raises(ValueError, match=r"got 'nobody'"):
        peers.select("cpu", ["nobody"])
    operators = list(run.OPERATORS)
    with pytest.raises(ValueError, match=r"cases must be among tiny, tiny-ragged, .* on cpu, got 7x7"):
        run.choose(operators, "cpu", ["tiny", "7x7"], None)
    with pytest.raises(ValueError, match=r"got 'nobody'"):
        run.choose(operators, "cpu", None, ["sigmoid", "nobody"])


def test_names_and_patterns_pick_operators_and_cases() -> None:
    def names(cases: list[str] | None, parts: list[str] | None) -> dict[str, tuple[list[str], list[str] | None]]:
        chosen = run.choose(list(run.OPERATORS), "cpu", cases, parts)
        return {operator.name: (names, own_parts) for operator, names, own_parts in chosen}

    assert list(names(None, None)) == ["soft_topk", "attention", "perturbation", "training_step", "scaling"]
    assert names(["tiny*"], None) == {"soft_topk": (["tiny", "tiny-ragged"], None)}
    assert names(["tiny", "L50-*"], ["sigmoid", "loop"]) == {
        "soft_topk": (["tiny"], ["sigmoid"]),
        "attention": (["L50-fp32", "L50-bf16"], ["loop"]),
    }
    assert names(["tiny", "L50-*"], ["loop"]).keys() == {"attention"}


def test_no_case_starts_beyond_the_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "--time-limit", "0") == 0
    assert "soft_topk tiny: left out, beyond its share of the limit of 0 s" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))


def test_no_operator_takes_the_time_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each case puts forward: the first operator's cases take 40 s each, the second's 10 s."""
    clock, seen = [0.0], []

    def operator(name: str, seconds: float) -> Operator:
        def measure(case: str, *_: object) -> list[dict[str, Any]]:
            clock[0] += seconds
            seen.append(f"{name} {case}")
            return []

        def nothing(*_: object) -> Any:
            raise AssertionError

        def cases(_: str) -> list[str]:
            return ["a", "b", "c", "d"]

        return Operator(name, cases, cases, measure, lambda _: None, nothing, nothing, {"cpu": ()}, ())

    monkeypatch.setattr(run, "OPERATORS", (operator("slow", 40.0), operator("quick", 10.0)))
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    assert run.main(["--time-limit", "100", "--out", str(tmp_path)]) == 0
    assert seen == ["slow a", "slow b", "quick a", "quick b", "quick c"]


def test_names_pick_contestants_and_ours_always_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(device: str, *chosen: str) -> list[str]:
        return [contestant.name for contestant in peers.select(device, list(chosen))]

    monkeypatch.undo()  # the real table
    assert names("cpu", "sigmoid") == ["mmer_fast cpu", "copy", "torch.sigmoid"]
    assert names("cuda", "sigmoid") == ["mmer_fast cuda", "mmer_fast triton", "copy", "torch.sigmoid"]
    assert names("cuda", "sigmoid", "fast triton") == ["mmer_fast triton", "copy", "torch.sigmoid"]


def test_slow_contestants_sit_out_and_ratios_pair_the_rounds() -> None:
    plan = timing.Plan(rounds=4, turn_s=0.001, budget_s=0.01)
    calls = {"fast": lambda: None, "slow": lambda: None, "slowest": lambda: None}
    timings = timing.interleave(calls, {"fast": 0.0, "slow": 0.004, "slowest": 7.0}, plan, "cpu")
    assert [len(timings[name].taken()) for name in calls] == [4, 1, 1]
    assert timings["slowest"].turns == [7.0, None, None, None]
    assert timing.ratios(timing.Timing([2.0, None, 9.0]), timing.Timing([1.0, 5.0, 3.0])) == [2.0, 3.0]


def test_a_turn_on_cuda_is_the_median_of_do_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing", reason="triton is not installed")
    signature = inspect.signature(testing.do_bench)

    def do_bench(*args: Any, **kwargs: Any) -> list[float]:
        asked = signature.bind(*args, **kwargs).arguments
        assert (asked["rep"], asked["return_mode"]) == (20, "all")
        return [0.5, 0.25, 8.0]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert timing.cuda_turn(lambda: None, 0.02) == (0.5e-3, 3)


def _row(case: str, step: str, contestant: str, us: float, ratio: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "operator": "soft_topk",
        "case": case,
        "pass": step,
        "contestant": contestant,
        "status": "ok",
        "us": us,
    }
    row |= {"n": 500, "ours": contestant == "mmer_fast cpu", "relaxation": SAME_PLAN, "of_copy": 0.25}
    row |= {"extra_bytes": 2**19, "roofline": 0.125 if step == harness.FORWARD else 0.5, "bound": "sigmoids"}
    row |= {"us_min": us, "us_max": us, "ratio": ratio, "ratio_min": ratio * 0.9, "ratio_max": ratio * 1.1}
    return row | {"value_error": 1.4e-7, "gradient_error": 2e-7 if step == harness.FORWARD_BACKWARD else None}


@pytest.fixture
def sample() -> dict[str, Any]:
    """A result in which every promise holds."""
    ratios = {"mmer_fast cpu": 1.0, "torch.sigmoid": 0.5, "torch.topk": 12.0, "Newton, torch.compile": 3.0}
    ratios["Sinkhorn-200 log, autograd"] = 1234.0
    rows = [
        _row(case, step, name, 60.0 * ratio, ratio)
        for case in ("64x500", "4096x512")
        for step in (harness.FORWARD, harness.FORWARD_BACKWARD)
        for name, ratio in ratios.items()
    ]
    machine = {"cpu": "Example CPU", "threads": 2, "isa": "avx2", "gpu": None, "cuda": None, "copy_gbps": 9.0}
    header = {"schema": results.SCHEMA, "created": "2025-01-02T03:04:05+00:00", "quick": False, "device": "cpu"}
    return header | {"machine": machine, "versions": {"torch": "2.13.0"}, "commit": "abc", "rows": rows}


@pytest.fixture
def _full_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(case_table.SOFT_TOPK, "cpu", (Case("64x500", 64, 500),))


@pytest.mark.usefixtures("_full_table")
def test_the_report_fills_the_readme_and_draws(tmp_path: Path, sample: dict[str, Any]) -> None:
    readme = tmp_path / "README.md"
    markers = "<!-- benchmark:soft_topk:cpu -->\nold\n<!-- /benchmark -->"
    readme.write_text(f"before\n{markers}\nafter\n<!-- /benchmark -->\n")
    (tmp_path / "a.json").write_text(json.dumps(sample))
    performance = tmp_path / "docs" / "performance.md"
    performance.parent.mkdir()
    performance.write_text("<!-- benchmark:promises:cpu -->\n<!-- /benchmark -->\n")
    assert report.main(["--results", str(tmp_path), "--root", str(tmp_path)]) == 0
    assert f"{len(CPU_BARS)} of {len(CPU_BARS)} promises hold in the newest results.\n<!--" in performance.read_text()
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmark:soft_topk:cpu -->\n![")
    assert text.endswith("<!-- /benchmark -->\nafter\n<!-- /benchmark -->\n")
    assert "\nold\n" not in text
    assert "| **mmer_fast cpu** | same plan | 60.0 µs | 1.00 | 60.0 µs | 1.00 | 0.500 MiB | 1e-07 / 2e-07 |" in text
    assert "| 4096x512 | 60.0 µs | 25 % | 12 % | 0.500x | 12.0x | 60.0 µs | 50 % | 3.00x | 1234x |" in text
    assert "Example CPU, 2 threads, avx2; torch 2.13.0; commit abc, 2025-01-02." in text
    assert (tmp_path / "soft_topk_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert 'id="soft_topk-cpu"' in (tmp_path / "index.html").read_text()


@pytest.mark.usefixtures("_full_table")
def test_the_report_without_markers_says_so(
    tmp_path: Path, sample: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    (tmp_path / "a.json").write_text(json.dumps(sample))
    assert report.main(["--results", str(tmp_path), "--root", str(tmp_path), "--no-plot"]) == 1
    assert "README.md must have the markers <!-- benchmark:soft_topk:cpu -->" in capsys.readouterr().err
    assert readme.read_text() == "no markers\n"


def test_a_promise_that_does_not_hold_is_listed_with_its_accounting(sample: dict[str, Any]) -> None:
    newton = bars.find(sample, "64x500", harness.FORWARD_BACKWARD, "Newton, torch.compile")
    assert newton is not None
    newton |= {"us": 114.0, "ratio": 1.9, "roofline": 0.2635}
    sample["rows"].insert(0, {"case": "memory", "pass": "forward", "contestant": "c", "ours": True, "status": "ok"})
    soft_topk = next(operator for operator in run.OPERATORS if operator.name == "soft_topk")
    text = promises.section("cpu", [(soft_topk, sample)])
    assert text.startswith(f"{len(CPU_BARS) - 1} of {len(CPU_BARS)} promises hold in the newest results.")
    assert "| 64x500 forward+backward: 2x faster than compiled Newton: 1.90x our time" in text
    assert "| mmer_fast cpu: 60.0 µs, 50 % (sigmoids); Newton, torch.compile: 114 µs, 26 % (sigmoids) |" in text
    newton["status"] = "not installed"
    assert "Newton, torch.compile was not measured | not measured |" in promises.section("cpu", [(soft_topk, sample)])


def test_the_report_takes_the_newest_full_result(tmp_path: Path, sample: dict[str, Any]) -> None:
    older = sample | {"created": "2024-12-31T00:00:00+00:00", "commit": "older"}
    quick = sample | {"created": "2025-06-01T00:00:00+00:00", "quick": True}
    for name, result in {"z": older, "b": sample, "c": quick}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    found = report.newest(tmp_path, "cpu", "soft_topk")
    assert found is not None
    assert found["commit"] == "abc"
    assert report.newest(tmp_path, "cuda", "soft_topk") is None
    assert report.newest(tmp_path, "cpu", "attention") is None
    (tmp_path / "d.json").write_text(json.dumps(sample | {"schema": 99}))
    with pytest.raises(report.ReportError, match=r"d\.json: expected schema 1, got 99"):
        report.newest(tmp_path, "cpu", "soft_topk")


def test_a_result_is_completed_by_earlier_runs_of_the_same_code(tmp_path: Path, sample: dict[str, Any]) -> None:
    first, second = (row for row in sample["rows"][:1] for _ in range(2))
    early = {"created": "2024-12-31T00:00:00+00:00", "rows": [first | {"case": "one", "us": 1.0}, second]}
    late = {"rows": [first | {"case": "one", "us": 2.0}]}
    for name, result in {"early": early, "other": early | {"commit": "other"}, "late": late}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(sample | result))
    found = report.newest(tmp_path, "cpu", "soft_topk")
    assert found is not None
    assert [(row["case"], row["us"]) for row in found["rows"]] == [("one", 2.0), ("64x500", second["us"])]


def test_a_result_that_lacks_cases_does_not_replace_one_that_has_all(tmp_path: Path, sample: dict[str, Any]) -> None:
    (soft_topk,) = (operator for operator in run.OPERATORS if operator.name == "soft_topk")
    every = [sample["rows"][0] | {"case": case} for case in soft_topk.cases("cpu")]
    for name, day, rows in (("whole", 1, every), ("short", 2, every[1:]), ("later", 3, every[:1])):
        result = sample | {"created": f"2025-01-0{day}", "commit": name, "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    found = report.newest(tmp_path, "cpu", "soft_topk")
    assert found is not None
    assert (found["commit"], len(found["rows"])) == ("whole", len(every))
    (tmp_path / "whole.json").unlink()
    found = report.newest(tmp_path, "cpu", "soft_topk")
    assert found is not None
    assert found["commit"] == "later"


@pytest.mark.parametrize("bar", CPU_BARS, ids=lambda bar: f"{bar.case} {bar.promise}")
def test_each_bar_holds_at_its_limit_and_fails_beyond(sample: dict[str, Any], bar: bars.Bar) -> None:
    row = bars.find(sample, bar.case, bar.step, *bar.contestants)
    assert row is not None
    for factor, holds in ((1.01, True), (0.99, False)):
        ratio = bar.at_least * factor
        row |= {"ratio": ratio, "ratio_min": ratio, "ratio_max": ratio}
        ((found, line),) = bars.check(sample, (bar,))
        assert found is holds
        assert line.startswith("PASS" if holds else "FAIL")
    row["status"] = "not installed"
    assert bars.check(sample, (bar,))[0][0] is False

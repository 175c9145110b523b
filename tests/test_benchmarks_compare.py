"""Whether the check finds that we became slower, and does not find it where the machine did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is no part of the wheel

from benchmarks import compare
from mmer_fast.bench.results import SCHEMA

RESULTS = Path(compare.__file__).parent / "results"
MACHINE = {"cpu": "Example CPU", "cores": 2, "threads": 2, "isa": "avx2", "gpu": None}


def row(contestant: str, us: float, spread: float = 1.01, **changes: Any) -> dict[str, Any]:
    """A row of 15 turns whose 20th and 80th percentile are `spread` apart."""
    side = spread**0.5
    figures = {"us": us, "rounds": 15, "ratio": us, "ratio_p20": us / side, "ratio_p80": us * side}
    named = {"operator": "op", "case": "c", "pass": "p", "contestant": contestant, "ours": contestant == "ours"}
    return {**named, "status": "ok", **figures, **changes}


def rows(ours: float, *others: float, spread: float = 1.01) -> list[dict[str, Any]]:
    return [row("ours", ours, spread), *(row(f"other {i}", us, spread) for i, us in enumerate(others))]


def verdict(new: list[dict[str, Any]], old: list[dict[str, Any]]) -> compare.Verdict:
    (found,) = compare.compare(new, old)
    return found


def test_a_slower_machine_is_not_a_slower_row() -> None:
    found = verdict(rows(30.0, 60.0, 90.0), rows(10.0, 20.0, 30.0))
    assert found.change == pytest.approx(1.0)
    assert not found.slower
    assert str(found).startswith("same    c p: ours: 1.00x the time")


def test_ours_that_became_slower_is_found() -> None:
    found = verdict(rows(12.0, 20.0, 30.0), rows(10.0, 20.0, 30.0))
    assert found.change == pytest.approx(1.2)
    assert found.slower
    assert str(found).startswith("SLOWER  c p: ours: 1.20x the time")
    assert str(verdict(rows(8.0, 20.0), rows(10.0, 20.0))).startswith("FASTER  ")


def test_one_of_the_others_that_became_faster_is_not_our_fault() -> None:
    assert not verdict(rows(10.0, 5.0, 30.0, 40.0), rows(10.0, 20.0, 30.0, 40.0)).slower


def test_the_tolerance_comes_from_the_spread_of_the_turns() -> None:
    quiet = verdict(rows(10.0, 20.0), rows(10.0, 20.0))
    noisy = verdict(rows(12.0, 20.0, spread=1.5), rows(10.0, 20.0, spread=1.5))
    assert quiet.tolerance == compare.LEAST
    assert 1.3 < noisy.tolerance < 2.0
    assert not noisy.slower
    assert verdict(rows(22.0, 20.0, spread=1.5), rows(10.0, 20.0, spread=1.5)).slower


def test_rows_of_few_turns_neither_are_judged_nor_judge() -> None:
    few, many = {"rounds": compare.TURNS - 1}, rows(10.0, 20.0, 30.0)
    found = verdict([row("ours", 30.0, **few), *many[1:]], many)
    assert (found.change, found.slower) == (None, False)
    assert str(found) == f"unknown c p: ours: fewer than {compare.TURNS} turns"
    found = verdict([many[0], row("other 0", 2.0, **few), many[2]], many)
    assert found.change == pytest.approx(1.0)
    assert verdict(rows(12.0, 20.0), [row("ours", 10.0, rounds=compare.TURNS), row("other 0", 20.0)]).slower
    once = [{k: v for k, v in each.items() if k not in ("rounds", "ratio_p20", "ratio_p80")} for each in many]
    assert verdict(once, once).change is None


def test_the_committed_results_can_be_compared() -> None:
    """All of them with each other: every kind of row that a result has."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    newest = max(results, key=lambda result: result["created"])
    for result in results:
        assert all(verdict.tolerance >= compare.LEAST for verdict in compare.compare(newest["rows"], result["rows"]))
    assert not any(verdict.slower for verdict in compare.compare(newest["rows"], newest["rows"]))


def test_rows_without_percentiles_have_a_range() -> None:
    old = row("x", 10.0)
    del old["ratio_p20"], old["ratio_p80"]
    ranged = old | {"ratio_min": 8.0, "ratio_max": 12.0}
    assert 0.02 < compare.standard_error(ranged) < 0.06


def test_what_was_not_measured_before_is_new() -> None:
    found = verdict(rows(10.0, 20.0), rows(10.0, 20.0)[:1])
    assert found.change is None
    assert not found.slower
    assert str(found) == "NEW     c p: ours"
    assert verdict(rows(10.0, 20.0), [row("ours", 10.0, status="wrong"), row("other 0", 20.0)]).change is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository of results; `git add` tracks a file."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def put(folder: Path, name: str, created: str, new: list[dict[str, Any]], *, tracked: bool, **changes: Any) -> None:
    result = {"schema": SCHEMA, "created": created, "quick": False, "device": "cpu", "machine": MACHINE}
    result |= {"versions": {"torch": "2.13.0"}, "commit": name, "rows": new}
    (folder / f"{name}.json").write_text(json.dumps(result | changes))
    if tracked:
        subprocess.run(["git", "-C", str(folder), "add", f"{name}.json"], check=True)


def test_the_newest_is_held_against_the_last_tracked_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "a", "2025-01-01", rows(99.0, 20.0), tracked=True)
    put(folder, "b", "2025-01-02", rows(10.0, 20.0), tracked=True)
    put(folder, "c", "2025-01-03", rows(99.0, 20.0), tracked=False)
    put(folder, "quick", "2025-01-05", rows(99.0, 20.0), tracked=True, quick=True)
    put(folder, "other", "2025-01-05", rows(99.0, 20.0), tracked=True, machine=MACHINE | {"threads": 1})
    put(folder, "d", "2025-01-04", rows(10.5, 20.0), tracked=False, versions={"torch": "2.14.0"})
    assert compare.main(["--results", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "op, Example CPU, 2 threads: d beside b" in printed
    assert "torch was 2.13.0, is 2.14.0" in printed
    assert "op, Example CPU, 1 threads: nothing to compare other with" in printed
    assert compare.main(["--results", str(folder), "--new"]) == 0
    assert "1 threads" not in capsys.readouterr().out
    put(folder, "e", "2025-01-06", rows(13.0, 20.0), tracked=True)
    assert compare.main(["--results", str(folder)]) == 1
    assert "SLOWER  c p: ours: 1.30x the time" in capsys.readouterr().out


def test_processors_of_one_name_are_told_apart_by_their_generation(folder: Path) -> None:
    for name, day, generation in (("a", 1, "25.17"), ("b", 2, "26.2"), ("c", 3, "25.17")):
        machine = MACHINE | {"cpu_generation": generation}
        put(folder, name, f"2025-01-0{day}", rows(10.0, 20.0), tracked=True, machine=machine)
    found = {new["commit"]: old and old["commit"] for _, new, old in compare.pairs(folder)}
    assert found == {"c": "a", "b": None}


def test_a_run_spread_over_several_files_is_one(folder: Path) -> None:
    other = [entry | {"case": "second"} for entry in rows(10.0, 20.0)]
    put(folder, "a", "2025-01-01", rows(10.0, 20.0) + other, tracked=True)
    put(folder, "b", "2025-01-02", rows(10.0, 20.0), tracked=False, commit="new")
    put(folder, "c", "2025-01-03", other, tracked=False, commit="new")
    ((name, new, old),) = compare.pairs(folder)
    assert (name, new["commit"]) == ("op", "new")
    assert {entry["case"] for entry in new["rows"]} == {"c", "second"}
    assert old is not None
    assert old["commit"] == "a"


def test_outside_of_git_there_is_nothing_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert compare.main(["--results", str(tmp_path)]) == 1
    assert "must be in a git repository" in capsys.readouterr().err

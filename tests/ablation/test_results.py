"""Statistics and tables against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from small_ablation import NO_ATM, ROBMMR, SUITE, small_data

from mmer_fast.ablation.plan import Plan, PlannedRow, make_plan
from mmer_fast.ablation.results import COLUMNS, RowResult, RunResult, Statistic, SuiteResults, values_of
from mmer_fast.ablation.tables import TextTable, metrics_table, published_table, remarks, robustness_table, spread
from mmer_fast.training.settings import Settings

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def metrics(f1: float, **changes: Any) -> dict[str, Any]:
    """Contents of a `metrics.json` whose test F1 is this, and whose other metrics are 0.25."""
    split = {**dict.fromkeys(COLUMNS, 0.25), "samples": 8}
    return {
        "train": {**split, "micro_f1": 0.9},
        "valid": {**split, "micro_f1": 0.6},
        "test": {**split, "micro_f1": f1, "shift": {"0": {**split, "micro_f1": 0.5}, "2": {**split, "micro_f1": 0.2}}},
        "mask_recall": {"audio": {"recall": 0.7, "chance": 0.4, "samples": 8}},
        "history": [],
        **changes,
    }


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(SUITE, small_data(), tmp_path, seeds=[0, 1, 2], settings=Settings())


def row(planned: PlannedRow, f1: dict[int, float]) -> RowResult:
    results = {
        run.seed: RunResult(run, metrics(f1[run.seed]), values_of(metrics(f1[run.seed])))
        for run in planned.runs
        if run.seed in f1
    }
    return RowResult(planned, results, {})


@pytest.fixture
def results(plan: Plan) -> SuiteResults:
    base = row(plan.rows[0], {0: 0.50, 1: 0.60, 2: 0.40})
    return SuiteResults(plan, (base, row(plan.rows[1], {0: 0.45, 2: 0.41})))


def test_mean_and_sample_deviation() -> None:
    assert Statistic.of([]) is None
    assert Statistic.of([0.3]) == Statistic(0.3, None, 1)
    three = Statistic.of([1.0, 2.0, 6.0])
    assert three is not None
    assert (three.mean, three.n) == (3.0, 3)
    assert three.std == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2


def test_a_difference_is_between_runs_of_the_same_seed(results: SuiteResults) -> None:
    base, other = results.rows
    mean = other.statistic("test/micro_f1")
    assert mean is not None
    assert (mean.mean, mean.n) == (pytest.approx(0.43), 2)
    difference = other.difference(base, "test/micro_f1")
    assert difference is not None
    assert (difference.mean, difference.n) == (pytest.approx(-0.02), 2)  # of -0.05 and 0.01
    assert difference.std == pytest.approx(0.03 * math.sqrt(2))
    assert other.difference(base, "part/7") is None
    opposite = base.difference(other, "test/micro_f1")  # which lacks a seed that the base has
    assert opposite is not None
    assert (opposite.mean, opposite.n) == (pytest.approx(0.02), 2)


def test_runs_that_were_only_pretrained_are_named(results: SuiteResults) -> None:
    assert not any("pretraining" in said for said in remarks(results))
    epochs = [{"epoch": 1, "pretraining": True}, {"epoch": 2, "pretraining": True}]
    one = results.base.results[1]
    for history, expected in ((epochs, True), ([*epochs, {"epoch": 3}], False)):
        changed = RunResult(one.run, {**one.metrics, "history": history}, one.values)
        base = RowResult(results.base.planned, {**results.base.results, 1: changed}, {})
        said = [text for text in remarks(SuiteResults(results.plan, (base,))) if "pretraining" in text]
        assert [text.partition(", ")[2] for text in said] == (
            ["seed 1: All 2 epochs were pretraining: the whole network was never trained, which takes more epochs."]
            if expected
            else []
        )


def test_the_values_of_a_run() -> None:
    values = values_of(metrics(0.45))
    assert values["test/micro_f1"] == 0.45
    assert values["valid/accuracy"] == 0.25
    assert (values["part/0"], values["part/2"]) == (0.5, 0.2)
    assert values["gap/valid"] == pytest.approx(0.3)
    assert values["gap/test"] == pytest.approx(0.4)  # the part as in training has 0.5
    assert (values["recall/audio"], values["chance/audio"]) == (0.7, 0.4)
    whole = metrics(0.45)
    del whole["test"]["shift"]
    assert values_of(whole)["gap/test"] == pytest.approx(0.45)


def test_the_table_of_metrics(results: SuiteResults) -> None:
    table = metrics_table(results)
    assert list(table.header) == ["", "Acc", "P", "R", "miF1", "HL", "maF1", f"miF1 {MINUS} RobMMR", "seeds"]
    quarter = "0.250 ± 0.000"
    assert list(table.rows[0]) == ["RobMMR", *[quarter] * 3, "0.500 ± 0.100", *[quarter] * 2, DASH, "3"]
    last = [quarter, quarter, f"{MINUS}0.020 ± 0.042", "2 of 3"]
    assert list(table.rows[1]) == [NO_ATM.name, *[quarter] * 3, "0.430 ± 0.028", *last]


def test_the_table_of_robustness_names_the_parts(results: SuiteResults) -> None:
    table = robustness_table(results)
    parts = ["miF1, as in training", "miF1, text missing"]
    assert list(table.header) == ["", *parts, "gap", "masks find, audio (chance)"]
    zero = "± 0.000"
    assert list(table.rows[1])[1:] == [f"0.500 {zero}", f"0.200 {zero}", f"0.400 {zero}", f"0.700 {zero} (0.400)"]


def test_published_numbers_stay_by_themselves(results: SuiteResults) -> None:
    table = published_table(results)
    assert table is not None
    assert list(table.rows[0]) == ["RobMMR", "0.400", "0.200", "0.500", "0.300", DASH]
    assert list(table.rows[1])[1:] == ["0.300", "0.300", "0.400", "0.200", f"{MINUS}0.100"]
    assert published_table(SuiteResults(results.plan, results.rows[:1])) is None
    ours = " ".join(cell for line in metrics_table(results).rows for cell in line)
    assert "0.300" not in ours  # only published


def test_all_numbers_are_in_the_json(results: SuiteResults) -> None:
    values = results.to_json()
    assert values["runs"] == {"finished": 5, "planned": 6}
    assert values["seeds"] == [0, 1, 2]
    base, other = values["rows"]
    assert base["statistics"]["test/micro_f1"] == {"mean": pytest.approx(0.5), "std": pytest.approx(0.1), "n": 3}
    assert other["difference"]["test/micro_f1"]["n"] == 2
    assert other["published"] == {"accuracy": 0.3, "hamming_loss": 0.3, "micro_f1": 0.4, "macro_f1": 0.2}
    assert other["train"] == {"rho": 0.0}
    assert [run["seed"] for run in other["runs"]] == [0, 2]
    assert other["runs"][1]["directory"] == "runs/no-atm-seed2"
    assert other["runs"][1]["test"]["shift"]["2"]["micro_f1"] == 0.2
    assert base["slug"] == ROBMMR.slug


def test_spread_and_cells() -> None:
    assert spread(None) == DASH
    assert spread(Statistic(-0.1234, None, 1)) == f"{MINUS}0.123"
    assert spread(Statistic(0.1234, 0.04567, 3), sign=True) == "+0.123 ± 0.046"
    table = TextTable(["", "x"], [["a|b^c", "1"]])
    assert table.to_markdown() == "|  | x |\n| --- | --: |\n| a\\|b^c | 1 |\n"
    assert "a|b<sup>c</sup>" in table.to_html()

"""The tables of ours in docs/systems are what the committed runs gave, and these are of today's rows and data; how a
study is trained, measured and written.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is no part of the wheel

from benchmarks.systems import measures, record, run, tables
from benchmarks.systems.measures import Finished
from benchmarks.systems.studies import CULTURES, SEEDS, STUDIES, Study
from mmer_fast.ablation.suites import Row
from mmer_fast.data import MultiModalData, make_correlated, make_dialogues, make_synthetic
from mmer_fast.systems.adaptation import CrossCulture, SemiSupervised
from mmer_fast.systems.interface import SystemModel
from mmer_fast.systems.m3er import M3ER
from mmer_fast.systems.mmin.model import MMIN
from mmer_fast.training.run import describe_data
from mmer_fast.training.systems import find_system

PAGES = Path(__file__).resolve().parent.parent / "docs" / "systems"
LINES = [(page, line) for page, lines in tables.pages().items() for line in lines]


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda text: text.split("|")[1].strip() if "|" in text else text)
def test_a_row_is_what_the_runs_gave(page: str, line: str) -> None:
    assert line in (PAGES / page).read_text().splitlines()


def configured(row: Row) -> tuple[object, ...]:
    """What a row comes to, in whatever words."""
    system = find_system(row.system)
    model, train = system.preset("compact")
    return row.slug, row.without, system.name, replace(model, **row.model), replace(train, **row.train)


@pytest.mark.parametrize("name", STUDIES)
def test_the_runs_are_of_the_rows_and_data_that_there_are(name: str) -> None:
    document, study = record.read(name), STUDIES[name]
    rows = [
        Row(row["name"], row["slug"], row["model"], row["train"], row["without"], system=row["system"])
        for row in document["rows"]
    ]
    assert list(map(configured, rows)) == list(map(configured, study.suite.rows))
    assert document["preset"] == "compact"
    assert document["settings"] == dict(study.settings)
    assert document["seeds"] == list(range(SEEDS))
    assert all([run["seed"] for run in row["runs"]] == document["seeds"] for row in document["rows"])
    assert not document["commit"].endswith("+")
    described = describe_data(study.data())
    del described["checksum"]  # of bits, which are the machine's own where NumPy computes exponentials
    assert {key: document["data"][key] for key in described} == described


def test_there_are_no_other_files() -> None:
    assert {path.stem for path in record.RESULTS.glob("*.json")} == {*STUDIES, "va_contrast"}


def test_numbers_are_written_as_on_the_pages() -> None:
    assert [tables.number(x) for x in (0.5, 1.0, -0.0114, 0.0)] == [".500", "1.000", "\N{MINUS SIGN}.011", ".000"]
    assert [tables.number(x, "+") for x in (0.0106, -0.2)] == ["+.011", "\N{MINUS SIGN}.200"]


FEW = {"n_train": 60, "n_valid": 20, "n_test": 20}
CONVERSATIONS = partial(make_dialogues, 0, n_train=8, n_valid=3, n_test=3)


def untrained(kind: type[SystemModel], data: MultiModalData, **settings: object) -> Finished:
    """A model that has seen the data, but not learnt from it."""
    torch.manual_seed(0)
    config = kind.config_class(**{**kind.presets["compact"].model, **settings})
    model = kind(data.modalities, len(data.label_names), config)
    model.fit(data.splits["train"])
    return Finished(model.eval(), data)


def test_the_measures_of_small_data() -> None:
    synthetic = untrained(M3ER, make_synthetic(0, **FEW))
    assert measures.buried(synthetic).keys() == {"buried/0", "buried/1", "buried/2"}
    correlated = make_correlated(0, n_train=400, n_valid=50, n_test=20)
    errors = measures.proxy_errors(untrained(M3ER, correlated))
    assert all(errors[f"proxy/compact/{name}"] < 0.6 for name in correlated.modalities)  # 1: as far as zeros
    assert all(errors[f"proxy/authors/{name}"] > 1 for name in correlated.modalities)
    assert measures.proxy_errors(untrained(M3ER, correlated, proxy=False)) == {}
    found = measures.conditions(untrained(MMIN, CONVERSATIONS()))
    assert {name.split("/")[1] for name in found} == set(tables.CONDITIONS)
    assert 0.2 < measures.culture_found(untrained(CrossCulture, CONVERSATIONS()))["culture"] <= 1
    assert measures.modality_distance(untrained(SemiSupervised, CONVERSATIONS()))["distance"] > 0


def test_a_study_is_trained_measured_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Study("tiny", CULTURES, CONVERSATIONS, {"epochs": 1, "cultures": 3}, measures.culture_found)
    monkeypatch.setattr(run, "STUDIES", {"tiny": tiny})
    monkeypatch.setattr(run, "SEEDS", 1)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "pages", lambda: {"page.md": ["| a row |"]})
    assert run.main(["tiny", "--out", str(tmp_path / "runs"), "--jobs", "1"]) == 0
    assert "page.md\n| a row |" in capsys.readouterr().out
    document = record.read("tiny")
    assert [row["slug"] for row in document["rows"]] == [row.slug for row in CULTURES.rows]
    assert all(0 <= row["runs"][0]["values"]["culture"] <= 1 for row in document["rows"])
    assert 0 < document["constant"]["1"]["overall_accuracy"] < 1
    assert run.main(["--out", str(tmp_path / "runs"), "--jobs", "1"]) == 0
    assert record.read("tiny")["rows"] == document["rows"]
    with pytest.raises(SystemExit):
        run.main(["other"])


def test_a_study_with_a_failed_run_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Study("wrong", CULTURES, CONVERSATIONS, {"epochs": 1, "learning_rate": 1e30})
    monkeypatch.setattr(run, "STUDIES", {"wrong": wrong})
    monkeypatch.setattr(run, "SEEDS", 1)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "pages", dict)
    assert run.main(["--out", str(tmp_path / "runs"), "--jobs", "1"]) == 1
    assert "not finite" in capsys.readouterr().out
    assert not record.RESULTS.exists()

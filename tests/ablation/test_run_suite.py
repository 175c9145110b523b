"""Suites run for real, small: runs that are there are kept, what fails or is killed takes nothing else along."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import matplotlib.image
import pytest
import torch
from small_ablation import NO_ATM, ROBMMR, run_small, small_data

from mmer_fast.ablation import Row, Suite
from mmer_fast.ablation.runner import resources
from mmer_fast.data import DataError, MultiModalData
from mmer_fast.report import write_report
from mmer_fast.training.checkpoint import CheckpointError
from mmer_fast.training.run import RunError

RUNS = ["no-atm-seed0", "no-atm-seed1", "robmmr-seed0", "robmmr-seed1"]
STATES = ["state.previous.safetensors", "state.safetensors"]
FILES = ["config.json", "metrics.json", "model.safetensors", *STATES, "train.log"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a suite that was run to its end, two runs at a time."""
    out = tmp_path_factory.mktemp("ablation") / "new"
    results = run_small(out, jobs=2)
    assert results.finished == 4
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to do things to."""
    return shutil.copytree(finished, tmp_path / "copy")


def written(out: Path) -> dict[str, int]:
    """When each file of the runs was written."""
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in (out / "runs").rglob("*.*")}


def test_a_suite_leaves_runs_tables_and_plots(finished: Path) -> None:
    tables = [f"small.{suffix}" for suffix in ("html", "json", "md", "png")]
    assert sorted(path.name for path in finished.iterdir()) == ["runs", *tables]
    assert sorted(path.name for path in (finished / "runs").iterdir()) == RUNS
    for run in RUNS:
        assert sorted(path.name for path in (finished / "runs" / run).iterdir()) == FILES
    config = json.loads((finished / "runs" / "no-atm-seed1" / "config.json").read_text())
    assert (config["train"]["rho"], config["train"]["seed"], config["model"]["dim"]) == (0.0, 1, 16)
    values = json.loads((finished / "small.json").read_text())
    for row in values["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        for run in row["runs"]:
            assert run["test"] == json.loads((finished / run["directory"] / "metrics.json").read_text())["test"]
    f1 = [[run["test"]["micro_f1"] for run in row["runs"]] for row in values["rows"]]
    assert values["rows"][0]["statistics"]["test/micro_f1"]["mean"] == pytest.approx(sum(f1[0]) / 2)
    assert values["rows"][1]["difference"]["test/micro_f1"]["mean"] == pytest.approx((sum(f1[1]) - sum(f1[0])) / 2)
    picture = matplotlib.image.imread(finished / "small.png")
    assert picture.std() > 0.05
    text = (finished / "small.md").read_text(encoding="utf-8")
    assert f"{sum(f1[0]) / 2:.3f} ± " in text
    assert "Partial" not in text


def test_the_report_takes_the_runs(finished: Path, tmp_path: Path) -> None:
    directories = [finished / "runs" / run for run in ("robmmr-seed0", "no-atm-seed1")]
    write_report(directories, tmp_path / "report.html", data=small_data(), measure_time=False)
    assert "no-atm-seed1" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_is_finished_is_not_trained_again(out: Path) -> None:
    before = written(out)
    (out / "small.md").unlink()
    assert run_small(out).finished == 4
    assert written(out) == before
    assert (out / "small.md").exists()


def test_only_what_is_missing_is_trained(out: Path) -> None:
    begun = out / "runs" / "no-atm-seed0"
    metrics = (begun / "metrics.json").read_bytes()
    (begun / "metrics.json").unlink()  # as if it had been stopped before its last evaluation
    state = (begun / "state.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "runs" / "robmmr-seed1")
    before = written(out)
    assert run_small(out, train=False).finished == 2
    assert "Partial: 2 of 4 runs are finished." in (out / "small.md").read_text()
    assert written(out) == before
    assert run_small(out).finished == 4
    assert (begun / "metrics.json").read_bytes() == metrics
    assert (begun / "state.safetensors").stat().st_mtime_ns == state
    after = written(out)
    kept = [name for name in before if name.startswith(("runs/no-atm-seed1", "runs/robmmr-seed0"))]
    assert len(kept) == 2 * len(FILES)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert "runs/robmmr-seed1/metrics.json" in after


def test_another_configuration_or_other_data_are_refused(out: Path) -> None:
    before = written(out)
    with pytest.raises(RunError, match=r"robmmr-seed0 \(RobMMR, seed 0\): .*train\.epochs: the run has 2, asked for 3"):
        run_small(out, epochs=3)
    with pytest.raises(RunError, match=r"data\.checksum\.train"):
        run_small(out, data=small_data(n_train=25), only=["no-atm"])
    (out / "runs" / "robmmr-seed0" / "metrics.json").write_text('{"train": {}}')
    with pytest.raises(CheckpointError, match=r"robmmr-seed0.metrics\.json lacks .*remove"):
        run_small(out, train=False)
    assert before.keys() == written(out).keys()


def test_only_the_rows_asked_for_are_trained_and_a_failure_stops_nothing_else(tmp_path: Path) -> None:
    diverging = Row("diverging", "diverging", train={"learning_rate": 1e30})
    suite = Suite("mixed", "Mixed", (ROBMMR, diverging, NO_ATM, Row("other", "other", train={"sigma": 0.0})))
    results = run_small(tmp_path, suite, seeds=1, only=["diverging", "no-atm"])
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["diverging-seed0", "no-atm-seed0"]
    assert [len(row.results) for row in results.rows] == [0, 0, 1, 0]
    assert "loss is not finite" in results.rows[1].errors[0]
    assert "loss is not finite in epoch 1, step " in (tmp_path / "runs" / "diverging-seed0" / "train.log").read_text()
    values = json.loads((tmp_path / "mixed.json").read_text())
    assert "not finite" in values["rows"][1]["errors"]["0"]
    assert values["rows"][2]["difference"]["test/micro_f1"] is None  # nothing to compare with yet
    assert "diverging, seed 0: failed, TrainingError" in (tmp_path / "mixed.md").read_text()


def test_a_killed_worker_takes_only_its_run_along(tmp_path: Path) -> None:
    endless = Row("endless", "endless", train={"epochs": 100_000})
    suite = Suite("killed", "Killed", (endless, NO_ATM))

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "runs" / "endless-seed0" / "state.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        (child,) = multiprocessing.active_children()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    results = run_small(tmp_path, suite, seeds=1)
    killer.join()
    assert "killed by SIGKILL" in results.rows[0].errors[0]
    assert len(results.rows[1].results) == 1
    assert multiprocessing.active_children() == []


def test_bad_data_and_bad_seeds_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for data in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(DataError, match=data.name):
            run_small(tmp_path / "out", data=data)
    for seeds in (0, [1, 1], []):
        with pytest.raises(RunError, match="seeds"):
            run_small(tmp_path / "out", seeds=seeds)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="cannot write"):
        run_small(tmp_path / "file" / "below")


def test_jobs_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def shared(device: str, jobs: int | None, runs: int) -> tuple[tuple[str, ...], int, int]:
        chosen = resources(torch.device(device), jobs, runs)
        return chosen.devices, chosen.jobs, chosen.threads

    assert shared("cpu", None, 60) == (("cpu",), 8, 1)
    assert shared("cpu", None, 3) == (("cpu",), 3, 2)
    assert shared("cpu", 4, 60) == (("cpu",), 4, 2)
    assert shared("cuda", None, 60) == (("cuda:0", "cuda:1"), 2, 4)
    assert shared("cuda:1", None, 60) == (("cuda:1",), 1, 8)


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    class Unpicklable(MultiModalData):
        def __reduce__(self) -> str:
            raise RuntimeError("no way to another process")

    data = small_data()
    source = Unpicklable(data.splits, data.label_names, data.modalities, data.source)
    with pytest.raises(RuntimeError, match="no way to another process"):
        run_small(tmp_path, data=source)
    assert multiprocessing.active_children() == []

"""The command: progress as plain lines, refusals in one line, exit codes, and an interrupt that leaves no process."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from small_ablation import SETTINGS, SUITE, small_data

from mmer_fast import cli
from mmer_fast.ablation.display import AblationDisplay
from mmer_fast.ablation.plan import make_plan
from mmer_fast.data import write_npz
from mmer_fast.training.settings import Settings

SET = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]


def mmer_fast(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command line that must end with 2 and one line on stderr; that line."""
    assert mmer_fast("ablate", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mmer-fast: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.npz"
    write_npz(small_data(), path)
    return path


def test_plain_lines_files_and_exit_codes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--suite", "figure5", "--data", data, "--seeds", 1, "--jobs", 1, "--device", "cpu", *SET)
    assert mmer_fast("ablate", *options, "--out", tmp_path, "--only", "natural", "--epochs", 1) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\r" not in captured.out
    assert "\x1b" not in captured.out
    assert captured.out.count("starts: natural training, seed 0") == 1
    assert "1/1 natural training, seed 0: finished" in captured.out
    assert f"1 of 4 runs finished; written to {tmp_path}" in captured.out
    assert (tmp_path / "runs" / "no-atm-no-app-seed0" / "metrics.json").exists()
    failing = (*options, "--out", tmp_path / "failing", "--only", "app", "--set", "learning_rate=1e30")
    assert mmer_fast("ablate", *failing) == 1
    captured = capsys.readouterr()
    assert "+ APP, seed 0: failed: TrainingError: the " in captured.out
    assert " not finite " in captured.out
    assert captured.err.startswith("mmer-fast: error: + APP, seed 0: TrainingError")
    assert captured.err.count("\n") == 1
    assert (tmp_path / "failing" / "figure5.md").exists()


def test_refusals_take_one_line_and_write_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    small = ("--data", data, "--device", "cpu")
    assert "suite must be one of table2" in refused(capsys, "--suite", "table9", "--out", out, *small)
    message = refused(capsys, "--suite", "figure5", "--only", "no-atm", "--only", "atm", "--out", out, *small)
    assert "no row no-atm; it has robmmr, natural, atm, app" in message
    absent = refused(capsys, "--suite", "figure5", "--out", out, "--data", tmp_path / "absent.npz")
    assert "absent.npz" in absent
    assert "colour" in refused(capsys, "--suite", "figure5", "--out", out, "--set", "colour=red", *small)
    assert "TrainConfig.epochs" in refused(capsys, "--suite", "figure5", "--out", out, "--epochs", 0, *small)
    assert "--device" in refused(capsys, "--suite", "figure5", "--out", out, "--device", "tpu")
    (tmp_path / "file").write_text("mine")
    assert "cannot write" in refused(capsys, "--suite", "figure5", "--out", tmp_path / "file", *small)
    assert mmer_fast("ablate", "--suite", "figure5", "--out", out, "--seeds", 0) == 2
    assert not out.exists()


def processes_of(group: int) -> list[int]:
    """Processes of a group that are there and not only waiting to be buried."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def heed_interrupts() -> None:
    """In a new process: a shell starts what runs in the background with SIGINT ignored, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_stops_every_process_and_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmer_fast", "ablate", "--suite", "figure5", "--data", data, "--out", tmp_path]
    command += ["--jobs", "2", "--seeds", "1", "--device", "cpu", *SET, "--set", "epochs=100000"]
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while len(list(tmp_path.glob("runs/*/state.safetensors"))) < 2:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            _, errors = process.communicate(timeout=60)
        except BaseException:  # else leaving the block would wait for it for ever
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 130
    assert errors == "interrupted; the same command goes on where this one stopped\n"
    while processes_of(process.pid):  # the helper of multiprocessing ends when it notices that its parent has
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "Partial: 0 of 4 runs are finished." in (tmp_path / "figure5.md").read_text(encoding="utf-8")
    assert list(tmp_path.rglob(".partial-*")) == []
    for log in tmp_path.glob("runs/*/train.log"):
        assert "stopped" in log.read_text(encoding="utf-8")


def test_a_terminal_shows_what_runs_and_how_much_is_done(tmp_path: Path) -> None:
    plan = make_plan(SUITE, small_data(), tmp_path, seeds=[0], settings=Settings())
    first, second = plan.chosen([])
    console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    with AblationDisplay(console, 2) as display:
        display.on_start(first)
        display.on_start(second)
        display.on_progress(first, 0.5)
        assert display.bar is not None
        total = display.bar.tasks[0]
        assert (total.completed, total.total) == (0.5, 2)
        assert [task.description for task in display.bar.tasks[1:]] == [first.label, second.label]
        display.on_end(first, None)
        display.on_end(second, "it broke")
        assert total.completed == 2
        assert total.description == "2 of 2 runs"
    text = console.export_text()
    assert f"1/2 {first.label}: finished" in text
    assert f"2/2 {second.label}: failed: it broke" in text

"""What a terminal shows of names and tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import mmer_fast
from rich.table import Table

from mmer_fast._console import plain_console, print_table

NAMES = ["[/b]", "calm [low]", ":smile:"]
SIZES = ("--epochs", 1, "--batch-size", 8, "--set", "dim=16", "--set", "ffn_dim=16", "--set", "heads=2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Labels and modalities with names that rich would take for markup."""
    rng = np.random.default_rng(0)
    arrays = {"label_names": np.array(NAMES)}
    for split in ("train", "valid", "test"):
        arrays[f"{split}_[/x]"] = rng.normal(size=(8, 3, 2)).astype(np.float32)
        arrays[f"{split}_audio"] = rng.normal(size=(8, 3, 2)).astype(np.float32)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (8, 3))
    path = tmp_path / "[bold]data.npz"
    np.savez(path, **arrays)
    return path


def test_names_are_no_markup(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmer_fast("inspect", data) == 0
    inspected = capsys.readouterr().out
    for name in (*NAMES, "[/x]", "[bold]data.npz"):
        assert name in inspected
    run = tmp_path / "[/red]run"
    assert mmer_fast("train", "--data", data, "--out", run, *SIZES) == 0
    assert f"written to {run}; to look at: {run / 'report.html'}" in capsys.readouterr().out
    assert mmer_fast("evaluate", "--run", run, "--data", data) == 0
    assert "[/red]run" in "".join(capsys.readouterr().out.split())  # a long title has several lines
    assert mmer_fast("evaluate", "--run", run, "--data", data, "--conditions") == 0
    assert "[/x]+audio" in capsys.readouterr().out
    for command in (
        ("predict", "--run", run, "--data", data, "--out", run / "p.csv"),
        ("explain", "--run", run, "--data", data, "--sample", 0, "--out", run / "e.html"),
        ("report", run, "--out", run / "r.html", "--no-timing"),
    ):
        assert mmer_fast(*command) == 0
        assert f"written to {run}" in capsys.readouterr().out


def test_a_table_cuts_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    table = Table("split", "Hamming loss", "micro-F1")
    table.columns[0].no_wrap = True
    table.add_row("  shift 0", "0.2812", "0.5455")
    print_table(plain_console(), table)
    shown = capsys.readouterr().out
    assert "…" not in shown
    for text in ("  shift 0", "Hamming", "loss", "micro-F1", "0.2812", "0.5455"):
        assert text in shown
    assert "Hamming loss" not in shown


@pytest.mark.parametrize("columns", ["40", "80"])
def test_inspect_shows_whole_words_in_a_narrow_terminal(
    columns: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert mmer_fast("inspect", data) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    for text in ("modality", "train", "8, 3, 2", "missing", "padding", "finite", "calm"):
        assert text in shown

"""The benchmark of UniVA's contrastive loss on a tiny batch: figures of every form, and a wrong one is found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is no part of the wheel

from benchmarks import va_contrast

TINY = ["--samples", "40", "--width", "4", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(form: str, samples: int, width: int, options: Any) -> dict[str, Any]:
        return va_contrast.measure(form, samples, width, options.device, options.rounds)

    monkeypatch.setattr(va_contrast, "in_a_process", here)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def test_every_form_computes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    features, va = va_contrast.inputs(40, 4, "cpu")
    values = [loss(features, va).item() for loss in va_contrast.FORMS.values()]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert va_contrast.main(TINY) == 0
    printed = capsys.readouterr().out
    assert printed.count("MiB   error") == 3
    assert "WRONG" not in printed


def test_figures_are_written_with_their_origin(tmp_path: Path) -> None:
    out = tmp_path / "va.json"
    assert va_contrast.main([*TINY, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [row["form"] for row in record["rows"]] == list(va_contrast.FORMS)
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"] == 1


def test_a_child_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert va_contrast.main([*TINY, "--form", "blocks"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["seconds"] > 0
    assert row["peak_bytes"] >= 0
    assert row["gradient_error"] < va_contrast.TOLERANCE


def test_a_wrong_gradient_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(va_contrast.FORMS, "blocks", lambda features, va: 1.001 * va_contrast.all_pairs(features, va))
    assert va_contrast.main([*TINY, "--out", str(tmp_path / "va.json")]) == 1
    assert not (tmp_path / "va.json").exists()
    assert "error 1e-03  WRONG" in capsys.readouterr().out


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(va_contrast, "MOST_BYTES", va_contrast.kept_bytes("all pairs", 40, 4))
    assert va_contrast.main(TINY) == 0
    assert "all products   not run: its backward pass needs about" in capsys.readouterr().out

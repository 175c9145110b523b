"""MMGCN's ablations as suites for `mmer_fast.ablation.run_suite`: fusion, speakers, modalities and depth.

What the talk publishes for them is weighted F1 on other data; it stands in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmer_fast.ablation import Row, Suite
from mmer_fast.ablation.suites import MINUS


def _row(name: str, slug: str, model: Mapping[str, Any] | None = None, without: str | None = None) -> Row:
    return Row(name, slug, model or {}, without=without, system="mmgcn")


ABLATION = Suite(
    "mmgcn",
    "MMGCN: fusion, speakers, modalities",
    (
        _row("MMGCN", "mmgcn"),
        _row("early fusion", "early", {"fusion": "early"}),
        _row("late fusion", "late", {"fusion": "late"}),
        _row(f"{MINUS} speaker embedding", "no-speakers", {"speaker_modalities": "none"}),
        _row("gamma = 1", "no-gamma", {"gamma": 1.0}),
        _row(f"{MINUS} text", "no-text", without="text"),
        _row(f"{MINUS} video", "no-video", without="video"),
        _row(f"{MINUS} audio", "no-audio", without="audio"),
    ),
)
_DEPTHS = (4, 1, 2, 8, 16, 32, 64)
DEPTH = Suite(
    "mmgcn-depth",
    "MMGCN: layers",
    tuple(_row(f"{layers} layers", f"layers-{layers}", {"layers": layers}) for layers in _DEPTHS),
    plot="sweep",
    sweep={f"layers-{layers}": layers for layers in _DEPTHS},
    sweep_label="layers",
)
"""The first row, with which the others are compared, is the talk's best; 64 is the published code."""

"""M3ER's ablation study as a suite for `mmer_fast.ablation.run_suite`.

What is published for it is overall F1 and mean accuracy on other data; it stands in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmer_fast.ablation import Row, Suite
from mmer_fast.ablation.suites import MINUS


def _row(name: str, slug: str, model: Mapping[str, Any] | None = None) -> Row:
    return Row(name, slug, model or {}, system="m3er")


ABLATION = Suite(
    "m3er",
    "M3ER: modality check, proxies, fusion",
    (
        _row("M3ER", "m3er"),
        _row(f"{MINUS} proxies", "no-proxies", {"proxy": False}),
        _row(f"{MINUS} check", "no-check", {"check": False}),
        _row(f"{MINUS} check {MINUS} proxies", "no-check-no-proxies", {"check": False, "proxy": False}),
        _row("original fusion", "original-fusion", {"fusion": "original"}),
        _row("modified, through the weights", "through-weights", {"detach_weights": False}),
        _row("plain cross-entropies", "no-weights", {"beta": 0.0}),
    ),
)

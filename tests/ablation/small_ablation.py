"""Small data, settings and a suite for the tests of ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmer_fast.ablation import Row, Suite, run_suite
from mmer_fast.ablation.results import SuiteResults
from mmer_fast.data import MultiModalData, make_synthetic

SETTINGS: dict[str, Any] = {
    "dim": 16,
    "ffn_dim": 24,
    "heads": 2,
    "unimodal_blocks": 1,
    "multimodal_blocks": 1,
    "batch_size": 8,
    "epochs": 2,
}
ROBMMR = Row("RobMMR", "robmmr", published=(0.4, 0.2, 0.5, 0.3))
NO_ATM = Row("\N{MINUS SIGN} E^t | <ATM>", "no-atm", train={"rho": 0.0}, published=(0.3, 0.3, 0.4, 0.2), note="A note.")
SUITE = Suite("small", "A small suite", (ROBMMR, NO_ATM))


def small_data(**sizes: int) -> MultiModalData:
    """Synthetic data with audio and video, and parts of the test split in which text says nothing."""
    counts = {"n_train": 24, "n_valid": 12, "n_test": 20, "max_length": 10, **sizes}
    return make_synthetic(3, **counts).select(["audio", "video"])


def run_small(out: Path, suite: Suite = SUITE, **options: Any) -> SuiteResults:
    """Run a suite on one process, over two seeds, without output."""
    options = {"data": small_data(), "seeds": 2, "jobs": 1, "device": "cpu", "show": False, **SETTINGS, **options}
    return run_suite(suite, out, **options)

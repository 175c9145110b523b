"""The systems by name: where each is, without importing it."""

from __future__ import annotations

ROBMMR = "robmmr"
SISTERS: dict[str, str] = {
    "univa": "mmer_fast.systems.univa:UniVA",
    "m3er": "mmer_fast.systems.m3er:M3ER",
    "mmgcn": "mmer_fast.systems.mmgcn:MMGCN",
    "mmin": "mmer_fast.systems.mmin:MMIN",
    "cross-culture": "mmer_fast.systems.adaptation:CrossCulture",
    "semi-supervised": "mmer_fast.systems.adaptation:SemiSupervised",
    "br": "mmer_fast.systems.baselines:BR",
    "cc": "mmer_fast.systems.baselines:CC",
    "lp": "mmer_fast.systems.baselines:LP",
    "lstm": "mmer_fast.systems.baselines:LSTM",
    "mult": "mmer_fast.systems.baselines:MulT",
    "hhmpn": "mmer_fast.systems.baselines:HHMPN",
    "tailor": "mmer_fast.systems.baselines:TAILOR",
}
"""Name → "module:class" of a `SystemModel`. To add a system, add a line."""
NAMES = (ROBMMR, *SISTERS)

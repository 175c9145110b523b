"""The systems by name: where each is, without importing it."""

from __future__ import annotations

ROBMMR = "robmmr"
SISTERS: dict[str, str] = {
    "mmin": "mmer_fast.systems.mmin:MMIN",
    "cross_culture": "mmer_fast.systems.adaptation:CrossCulture",
    "semi_supervised": "mmer_fast.systems.adaptation:SemiSupervised",
}
"""Name → "module:class" of a `SystemModel`. To add a system, add a line."""
NAMES = (ROBMMR, *SISTERS)

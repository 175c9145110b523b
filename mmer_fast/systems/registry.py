"""The systems by name: where each is, without importing it."""

from __future__ import annotations

ROBMMR = "robmmr"
SISTERS: dict[str, str] = {
    "m3er": "mmer_fast.systems.m3er:M3ER",
}
"""Name → "module:class" of a `SystemModel`. To add a system, add a line."""
NAMES = (ROBMMR, *SISTERS)

"""How figures and machines are written in the README and under plots."""

from __future__ import annotations

from typing import Any


def microseconds(value: float) -> str:
    """Three digits, in the unit that reads best."""
    for limit, scale, unit in ((1e3, 1.0, "µs"), (1e6, 1e-3, "ms"), (float("inf"), 1e-6, "s")):
        if value < limit:
            return f"{three_digits(value * scale)} {unit}"
    raise AssertionError


def three_digits(value: float) -> str:
    """At least three significant digits, never an exponent."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def roofline(row: dict[str, Any] | None) -> str:
    """The share of the roofline that a row reaches, e.g. ``42 %``; a dash where it is not known."""
    return f"{100 * row['roofline']:.0f} %" if row is not None and "roofline" in row else "-"


def mebibytes(count: float) -> str:
    """A number of bytes in MiB."""
    return f"{three_digits(count / 2**20)} MiB"


def count(value: float) -> str:
    """A number of things: commas from a thousand on, e.g. ``65,536`` or ``0.25``."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def caption(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    if machine["gpu"]:
        where = f"{machine['gpu']}, CUDA {machine['cuda']}, cold L2"
    else:
        generation = machine.get("cpu_generation")  # results before 2026-11-28 do not say it
        cpu = f"{machine['cpu']} (family and model {generation})" if generation else machine["cpu"]
        where = f"{cpu}, {machine['threads']} threads, {machine['isa']}"
    return f"{where}; torch {versions['torch']}; commit {result['commit']}, {result['created'][:10]}."

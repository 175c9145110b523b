"""A result: rows, and what they are worth knowing with; a JSON file of its own each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmer_fast._files import write_text_atomically
from mmer_fast.bench import ceilings, machine
from mmer_fast.bench.ceilings import Ceilings

SCHEMA = 1

Result = dict[str, Any]


def header(device: str, plan: str, packages: Iterable[str]) -> Result:
    """All of a result but its rows; measures the ceilings.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        plan: a name of `timing.PLANS`; a quick result is for a look, never for a report.
        packages: distributions whose versions count.
    """
    measured: Ceilings = ceilings.measure(device)
    return {
        "schema": SCHEMA,
        **machine.provenance(packages),
        "plan": plan,
        "quick": plan == "quick",
        "device": device,
        "machine": machine.describe(device, measured["copy_gbps"]),
        "ceilings": measured,
        "timer": "triton.testing.do_bench, cold L2" if device == "cuda" else "perf_counter, interleaved turns",
        "rows": [],
    }


def new_file(out: Path, result: Result) -> Path:
    """A path that no other run has: results are only ever added."""
    date, quick = result["created"][:10], "-quick" if result["quick"] else ""
    stem = f"{date}-{result['device']}-{machine.slug(result['machine'])}{quick}"
    path, counter = out / f"{stem}.json", 1
    while path.exists():
        counter += 1
        path = out / f"{stem}-{counter}.json"
    out.mkdir(parents=True, exist_ok=True)
    return path


def write(result: Result, path: Path) -> None:
    """The result as JSON, in place of what is there."""
    write_text_atomically(path, json.dumps(result, indent=1) + "\n")

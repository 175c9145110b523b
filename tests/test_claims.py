"""The tables in benchmarks/claims/README.md are what the committed runs gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CLAIMS = Path(__file__).resolve().parent.parent / "benchmarks" / "claims"
MINUS, GAMMA = "\N{MINUS SIGN}", "\N{GREEK SMALL LETTER GAMMA}"
PARTS = ("part/0", "part/1", "part/2")
POM = ("natural", "atm", "app", "robmmr", "random-mask-alone")
DEFAULT = {
    "natural training": "natural",
    "+ ATM": "atm",
    "+ APP": "app",
    "RobMMR: both": "robmmr",
    "random masks alone": "random-mask-alone",
    "random perturbation alone": "random-perturbation-alone",
}


def row(study: str, slug: str) -> dict[str, Any]:
    study_file = CLAIMS / study / "claims.json"
    return next(row for row in json.loads(study_file.read_text())["rows"] if row["slug"] == slug)


def line(label: str, found: dict[str, Any], names: tuple[str, ...]) -> str:
    statistics = [found["statistics"][name] for name in names]
    return f"| {label} | " + " | ".join(f"{each['mean']:.3f} ± {each['std']:.3f}" for each in statistics) + " |"


def line_of_differences(label: str, found: dict[str, Any], base: dict[str, Any], names: tuple[str, ...]) -> str:
    pairs = list(zip(found["runs"], base["runs"], strict=True))
    cells = []
    for name in names:
        differences = (ours["values"][name] - theirs["values"][name] for ours, theirs in pairs)
        cells.append(", ".join(f"{difference:+.3f}".replace("-", MINUS) for difference in differences))
    return f"| {label} | " + " | ".join(cells) + " |"


def expected() -> list[str]:
    names = ("test/micro_f1", *PARTS, "gap/test")
    lines = [line(label, row("", slug), names) for label, slug in DEFAULT.items()]
    natural = row("units", "natural")
    for label, slug in (("+ ATM", "atm"), ("random masks alone", "random-mask-alone")):
        lines.append(line_of_differences(label, row("units", slug), natural, ("test/micro_f1", "part/1", "part/2")))
    radius = {
        "natural training": ("", "natural"),
        f"+ APP, {GAMMA} = 0.01": ("radius", "app"),
        f"+ APP, {GAMMA} = 0.03": ("", "app"),
    }
    names = ("train/micro_f1", "test/micro_f1", "part/1", "part/2", "gap/test")
    lines += [line(label, row(*where), names) for label, where in radius.items()]
    names = ("train/micro_f1", "test/micro_f1", "gap/test")
    return lines + [line(f"{label}, POM", row("pom", slug), names) for label, slug in DEFAULT.items() if slug in POM]


@pytest.mark.parametrize("wanted", expected(), ids=lambda text: text.split("|")[1].strip())
def test_a_row_is_what_the_runs_gave(wanted: str) -> None:
    assert wanted in (CLAIMS / "README.md").read_text().splitlines()


def test_every_study_is_shown() -> None:
    text = (CLAIMS / "README.md").read_text()
    for study in CLAIMS.glob("*/claims.json"):
        assert f"]({study.parent.name}/claims.md)" in text

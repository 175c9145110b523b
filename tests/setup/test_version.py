"""The version is written in mmer_fast/_version.py; everything else agrees with it."""

from __future__ import annotations

import email
import re
from pathlib import Path

from building import ROOT, Python

import mmer_fast


def test_the_newest_entry_of_the_changelog() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    newest = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (Unreleased|\d{4}-\d\d-\d\d)", headings[0])
    assert newest is not None, headings[0]
    assert newest[1] == mmer_fast.__version__


def test_metadata_of_a_wheel(tree: Path, this_python: Python) -> None:
    command = ["-c", "from setuptools import build_meta as b; print(b.prepare_metadata_for_build_wheel('meta'))"]
    (tree / "meta").mkdir()
    result = this_python.run(*command, cwd=tree, MMER_PURE_PYTHON="1")
    assert result.returncode == 0, result.stderr
    (metadata,) = (tree / "meta").glob("*.dist-info/METADATA")
    assert email.message_from_string(metadata.read_text())["Version"] == mmer_fast.__version__

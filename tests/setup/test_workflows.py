"""The workflows of GitHub: what they call is there, every action is pinned, and only a tag publishes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from building import ROOT

yaml = pytest.importorskip("yaml")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _jobs(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text())["jobs"]


def _steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in _jobs(path).values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_to_a_commit(path: Path) -> None:
    used = [step["uses"] for step in _steps(path) if "uses" in step]
    assert used
    assert not [name for name in used if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", name)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_is_called_is_there(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in (step["run"] for step in _steps(path) if "run" in step):
        for script in re.findall(r"\.ci/[\w-]+", command):
            assert os.access(ROOT / script, os.X_OK), script
        for targets in re.findall(r"^make ((?:[a-z-]+ )*[a-z-]+)", command, flags=re.MULTILINE):
            for target in targets.split():
                assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_jobs_read_and_wait_for_jobs_that_exist(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    jobs = _jobs(path)
    assert {job["needs"] for job in jobs.values() if "needs" in job} <= jobs.keys()
    assert all(job["timeout-minutes"] > 0 for name, job in jobs.items() if name != "publish")


def test_only_a_checked_tag_publishes() -> None:
    jobs = _jobs(ROOT / ".github" / "workflows" / "wheels.yml")
    may_publish = [name for name, job in jobs.items() if "permissions" in job]
    assert may_publish == ["publish"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["if"] == "github.ref_type == 'tag'"
    assert jobs["publish"]["needs"] == "check"
    assert jobs["check"]["needs"] == "build"

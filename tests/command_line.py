"""Command lines, run in the process of a test."""

from __future__ import annotations

import pytest

from mmer_fast import cli


def mmer_fast(*arguments: object) -> int:
    """Run a command line in this process; its exit code."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """Run a command line that must fail with one line on stderr; that line."""
    assert mmer_fast(*arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("mmer-fast: error: ")
    assert captured.err.count("\n") == 1
    return captured.err

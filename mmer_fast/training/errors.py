"""How training ends before its time."""

from __future__ import annotations

import signal


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


class Terminated(SystemExit):
    """Training ended at a step boundary because of SIGTERM, with its state saved.

    A script that lets it pass exits with 143, as a shell reports a process that SIGTERM ended.
    """

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "terminated by SIGTERM"

"""SIGTERM, a scheduler's warning: noted, for training to save its state and leave at the next step boundary."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TerminationRequest:
    """Notes SIGTERM within a `with` block, where the process would die of it; afterwards the old handler is back.

    Python handles signals in the main thread: in another the block changes nothing.

    Attributes:
        received: whether SIGTERM has come.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: Any = None

    def __enter__(self) -> TerminationRequest:
        if _in_main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _in_main_thread():
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

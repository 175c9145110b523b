"""Training in a forked process, on one thread, that may be killed or limited without harm to the tests."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import torch


def start(work: Callable[[], object]) -> int:
    """Fork a process that does `work` and exits: with 0, or with 1 and a traceback. Its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a process, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def runs(pid: int) -> bool:
    """Whether a process has not ended yet."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

"""One training at a time in a directory: a second one, of which each would overwrite what the other writes, is refused.

The lock is one of the operating system on the directory itself, so it leaves no file, and is gone with the process that
holds it, however that ends. Processes that are forked from it do not hold it: workers may outlive a killed training by
some seconds.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()
"""File descriptors of the locked directories."""


@contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Hold a directory; gives whether nobody else does, of this process or another on this machine.

    Where the file system has no locks that is taken for true.

    Args:
        directory: existing.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    _held.add(descriptor)
    try:
        yield _try_lock(descriptor)
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _let_go() -> None:
    """In a process that was forked: its copies of the descriptors would hold the locks on."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)

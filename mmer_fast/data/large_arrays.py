"""Arrays that may be larger than memory: those that would take much of it lie in a file without a name.

The kernel writes pages of such a file to disk and takes their memory where that is short; memory without a file it has
to keep. The disk space is reserved at once, and free again when the array is gone. What one process writes into the
array its forked children see, and the other way round.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mmer_fast.data.errors import DataError

SHARE = 0.25
"""Of the memory that is available; an array that takes more than that goes to disk."""
BLOCK_BYTES = LARGE = 32 << 20
"""Read at a time; smaller arrays are read at once, and always lie in memory."""


def blocks(values: np.ndarray) -> Iterator[slice]:
    """Slices of the first axis that cover ``values``, each of about 32 MiB, at least one row."""
    rows = max(1, BLOCK_BYTES // max(1, values.nbytes // max(1, len(values))))
    for start in range(0, len(values), rows):
        yield slice(start, min(start + rows, len(values)))


def zeros(shape: Sequence[int], dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
    """Zeros of a shape and dtype, in memory or in a file of the folder for temporary ones, which should be on a disk.

    Raises:
        DataError: the array is too large for memory, and that folder has no room for it.
    """
    size = math.prod(int(n) for n in shape) * np.dtype(dtype).itemsize
    available = available_memory()
    if size < LARGE or size <= SHARE * available:
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(prefix="mmer_fast-") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would be a SIGBUS at some later write
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        if size < available:
            return np.zeros(shape, dtype)
        raise DataError(
            f"an array of {size / 1e9:.1f} GB needs as much room in {tempfile.gettempdir()} beside "
            f"{available / 1e9:.1f} GB of memory ({error.strerror}); TMPDIR names another folder"
        ) from None
    return np.ndarray(shape, dtype, buffer=mapped)


def copied(values: np.ndarray, dtype: np.typing.DTypeLike | None = None) -> np.ndarray:
    """A copy that can be written to, in ``dtype``; a block at a time. Raises as `zeros`."""
    result = zeros(values.shape, values.dtype if dtype is None else dtype)
    for block in blocks(values):
        result[block] = values[block]
    return result


def in_float32(values: np.ndarray) -> np.ndarray:
    """``values`` as float32, themselves where they are that already; what overflows becomes inf. Raises as `zeros`."""
    if values.dtype == np.float32:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        return copied(values, np.float32)


def available_memory() -> float:
    """Bytes that this process could still take: of the machine, or of its container (control groups v2)."""
    return min(_of_machine(), _of_container())


def _of_machine() -> float:
    try:
        return 1024.0 * _entries(Path("/proc/meminfo"))["MemAvailable:"]
    except (OSError, ValueError, KeyError):
        return math.inf


def _of_container(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """What a limit leaves, with the memory of files that the kernel would give back."""
    try:
        limit, used = (float((folder / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        cached = _entries(folder / "memory.stat")
        return max(0.0, limit - used + cached["inactive_file"] + cached["active_file"])
    except (OSError, ValueError, KeyError):  # "max", no limit, is no number
        return math.inf


def _entries(path: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text(encoding="ascii").splitlines()}

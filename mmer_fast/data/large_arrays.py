"""Arrays that may be larger than memory: those that would take much of it lie in a file without a name.

The kernel writes pages of such a file to disk where memory is short, and reads them back; memory that belongs to no
file it has to keep. The disk space is reserved at once, and is free again when the array is gone.
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
"""Read at a time; smaller arrays are read at once."""


def blocks(values: np.ndarray) -> Iterator[slice]:
    """Slices of the first axis that cover ``values``, each of about 32 MiB, at least one row."""
    rows = max(1, BLOCK_BYTES // max(1, values.nbytes // max(1, len(values))))
    for start in range(0, len(values), rows):
        yield slice(start, min(start + rows, len(values)))


def zeros(shape: Sequence[int], dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
    """As `numpy.zeros`.

    Raises:
        DataError: the array is too large for memory, and the folder of temporary files has no room for it.
    """
    size = math.prod(int(n) for n in shape) * np.dtype(dtype).itemsize
    if size <= SHARE * available_memory():
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(prefix="mmer_fast-") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would be a signal at some later write
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise DataError(
            f"an array of {size / 1e9:.1f} GB needs as much room in {tempfile.gettempdir()} beside "
            f"{available_memory() / 1e9:.1f} GB of memory ({error.strerror}); TMPDIR names another folder"
        ) from None
    return np.ndarray(shape, dtype, buffer=mapped)


def copied(values: np.ndarray, dtype: np.typing.DTypeLike | None = None) -> np.ndarray:
    """A copy that can be written to, in ``dtype``; a block at a time."""
    result = zeros(values.shape, values.dtype if dtype is None else dtype)
    for block in blocks(values):
        result[block] = values[block]
    return result


def in_float32(values: np.ndarray) -> np.ndarray:
    """``values`` as float32, themselves where they are that already; what overflows becomes inf."""
    if values.dtype == np.float32:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        return copied(values, np.float32)


def available_memory() -> float:
    """Bytes that this process could still take: of the machine, and of its control group where that has a limit."""
    return min(_of_machine(), _of_control_group())


def _of_machine() -> float:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    return math.inf


def _of_control_group() -> float:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return max(0.0, float(limit) - float(used))  # "max", no limit, is no number
    except (OSError, ValueError):
        return math.inf

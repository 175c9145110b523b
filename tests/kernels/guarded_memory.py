"""Arrays whose every byte outside is watched: a page that may not be touched, or canaries that must not change."""

from __future__ import annotations

import ctypes
import mmap
from typing import Protocol

import numpy as np

FILL = 0xFF  # a NaN in float16, bfloat16, float32 and float64 that no kernel writes
_CANARIES = 256  # bytes to either side


class Allocator(Protocol):
    def __call__(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray: ...

    def intact(self) -> bool: ...


class Canaries:
    """C-contiguous arrays filled with `FILL` between canaries; `intact` says whether no canary was overwritten."""

    def __init__(self) -> None:
        self._blocks: list[tuple[np.ndarray, int]] = []

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        block = np.full(size + 2 * _CANARIES, FILL, np.uint8)
        self._blocks.append((block, size))
        return block[_CANARIES : _CANARIES + size].view(dtype).reshape(shape)

    def intact(self) -> bool:
        return all(
            (block[:_CANARIES] == FILL).all() and (block[_CANARIES + size :] == FILL).all()
            for block, size in self._blocks
        )


class GuardPages:
    """C-contiguous arrays that end at a page without access: a read or write beyond is a SIGSEGV."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, usable + mmap.PAGESIZE)
        self._maps.append(memory)
        block = np.frombuffer(memory, np.uint8)
        guard = ctypes.c_void_p(block.ctypes.data + usable)
        if self._libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        array = block[usable - size : usable]
        array[...] = FILL
        return array.view(dtype).reshape(shape)

    def intact(self) -> bool:
        return True  # anything else has ended the process


ALLOCATORS: dict[str, type[Canaries] | type[GuardPages]] = {"canaries": Canaries, "guard-page": GuardPages}


def untouched(array: np.ndarray) -> np.ndarray:
    """(same shape) bool: entries that still hold `FILL` in every byte."""
    return (np.ascontiguousarray(array)[..., None].view(np.uint8) == FILL).all(-1)

"""Arrays beyond whose end a page may not be touched, or the sanitizer's red zone begins."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import numpy as np

FILL = 0xFF  # a NaN in float16, bfloat16, float32 and float64 that no kernel writes
Allocator = Callable[[tuple[int, ...], np.dtype], np.ndarray]


def heap(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A C-contiguous array of `FILL` in a heap block of just its size, which AddressSanitizer watches."""
    size = int(np.prod(shape)) * dtype.itemsize
    return np.full(size, FILL, np.uint8).view(dtype).reshape(shape)


class GuardPages:
    """Makes C-contiguous arrays of `FILL` that end at a page without access: a touch beyond is a SIGSEGV."""

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


ALLOCATORS: dict[str, Callable[[], Allocator]] = {"heap": lambda: heap, "guard-page": GuardPages}


def untouched(array: np.ndarray) -> np.ndarray:
    """(same shape) bool: entries that still hold `FILL` in every byte."""
    return (np.ascontiguousarray(array)[..., None].view(np.uint8) == FILL).all(-1)

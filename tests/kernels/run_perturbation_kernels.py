"""The perturbation's part of run_cpu_kernels.py: every case in guarded memory; norms, the step and the way back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from guarded_memory import FILL, Allocator, untouched
from perturbation_kernel_cases import SCOPES, SIZES, SMALLEST, PerturbationInputs, half_ulp, numbers

LINE = 64  # bytes: what the widest streaming store must be aligned to
NORM_TOLERANCE = 1e-13  # relative


class PerturbationRun:
    """One case: its arrays in guarded memory, the three passes, and what is wrong with what they wrote."""

    def __init__(self, module: Any, inputs: PerturbationInputs, allocate: Allocator) -> None:
        self.module, self.inputs, self.case, self.allocate = module, inputs, inputs.case, allocate
        self.margins: list[tuple[np.ndarray, int]] = []  # bytes, and what all of them are
        self.weights = [self._place(x) for x in inputs.weights]
        self.grads = [self._place(x) for x in inputs.grads]
        self.stash = [self._place(x) for x in inputs.weights]
        size = module.perturbation_chunk
        self.chunks = [(t, i, min(i + size, n)) for t, n in enumerate(SIZES) for i in range(0, n, size)]
        chunks = self.allocate((len(self.chunks), 3), np.dtype(np.int64))
        chunks[...] = self.chunks
        self.awp = self.case.scope == "awp"
        self.options: dict[str, Any] = {
            "weights": self.weights, "grads": self.grads, "stash": self.stash, "chunks": chunks,
            "weight_dtypes": inputs.weight_dtypes, "grad_dtypes": inputs.grad_dtypes,
            "scope": SCOPES[self.case.scope], "adaptive": self.case.adaptive, "radius": self.case.radius,
            "streaming": self.case.streaming, "norms": None, "weight_norms": None, "parts": None,
            "weight_parts": None,
        }  # fmt: skip

    def _place(self, bits: np.ndarray) -> np.ndarray:
        """A copy that begins as the case says; what surrounds it must stay, and no two arrays are surrounded alike."""
        n, item = len(bits), bits.itemsize
        if self.case.begins == "anywhere":
            array = self.allocate((n,), bits.dtype)
        else:
            block = self.allocate((n + 2 * LINE // item,), bits.dtype)
            begin = -block.ctypes.data % LINE // item + (self.case.begins == "off")
            array = block[begin : begin + n]
            for margin in (block[:begin], block[begin + n :]):
                self.margins.append((margin.view(np.uint8), 1 + len(self.margins)))
                self.margins[-1][0][...] = self.margins[-1][1]
        array[...] = bits
        return array

    def _doubles(self, n: int) -> np.ndarray:
        return self.allocate((n,), np.dtype(np.float64))

    def problems(self) -> Iterator[str]:
        yield from self._norm_problems()
        moved = yield from self._step_problems()
        yield from self._chunk_problems(moved)
        if not all(_same(x, y) for x, y in zip(self.grads, self.inputs.grads, strict=True)):
            yield "gradients were written"
        if not all((margin == byte).all() for margin, byte in self.margins):
            yield "something was written beside an array"

    def _norms(self, begin: int, end: int) -> list[np.ndarray]:
        """The parts of all chunks, those of [begin, end) filled in; in scope awp also those of the weights."""
        parts = [self._doubles(len(self.chunks)) for _ in range(1 + self.awp)]
        self.options["parts"], self.options["weight_parts"] = parts[0], parts[1] if self.awp else None
        self.module.perturbation_norm(self.options, begin, end)
        return parts

    def _norm_problems(self) -> Iterator[str]:
        """Fills in norms and weight_norms too."""
        count = len(self.chunks)
        whole = self._norms(0, count)
        for begin, end in [(c, c + 1) for c in reversed(range(count))] + [(1, count - 1), (0, 0)]:
            for got, expected in zip(self._norms(begin, end), whole, strict=True):
                if not _same(got[begin:end], expected[begin:end]):
                    yield f"the norms of chunks {begin} to {end} depend on what else is computed with them"
                if not untouched(np.delete(got, slice(begin, end))).all():
                    yield f"norms were written beyond chunks {begin} to {end}"
        groups = self.inputs.groups
        self.options["norms"] = self._doubles(len(groups))
        if self.awp:
            self.options["weight_norms"] = self._doubles(len(SIZES))
        for i, group in enumerate(groups):
            mine = [c for c, chunk in enumerate(self.chunks) if chunk[0] in group]
            norm = self.options["norms"][i] = self.module.perturbation_norm_of_norms(whole[0][mine])
            yield from _off(f"norm {i}", norm, self.inputs.norm(group))
            if self.awp:
                norm = self.options["weight_norms"][i] = self.module.perturbation_norm_of_norms(whole[1][mine])
                yield from _off(f"weight norm {i}", norm, self.inputs.weight_norm(i))

    def _reset(self) -> None:
        """As before the step."""
        for array, bits in zip(self.weights, self.inputs.weights, strict=True):
            array[...] = bits
        for array in self.stash:
            array.view(np.uint8)[...] = FILL

    def _step_problems(self) -> Iterator[str]:
        """Returns the moved weights."""
        count = len(self.chunks)
        self._reset()
        self.module.perturbation_apply(self.options, 0, count)
        moved = [array.copy() for array in self.weights]
        for i, group in enumerate(self.inputs.groups):
            for t in group:
                yield from (f"tensor {t}: {problem}" for problem in self._moved_problems(t, i, moved[t]))
        yield from self._stash_problems("the step", range(count))
        self.module.perturbation_restore(self.options, 0, count)
        yield from self._weight_problems("the restoring", self.inputs.weights)
        yield from self._stash_problems("the restoring", range(count))
        return moved

    def _moved_problems(self, tensor: int, group: int, bits: np.ndarray) -> Iterator[str]:
        norm, reach = float(self.options["norms"][group]), self.case.radius
        if self.awp:
            reach *= float(self.options["weight_norms"][group])
        if not (0 < norm < math.inf and 0 < reach < math.inf):
            if not _same(bits, self.inputs.weights[tensor]):
                yield f"norm {norm} and reach {reach}, yet the weights have changed"
            return
        dtype = self.inputs.weight_dtypes[tensor]
        got = numbers(bits, dtype).astype(np.longdouble)
        exact, slack = self.inputs.moved(tensor, norm, reach)
        finite = np.isfinite(exact)
        if not np.array_equal(got[~finite], exact[~finite], equal_nan=True):
            yield "weights that are not finite have become others"
        got, exact, slack = got[finite], exact[finite], slack[finite]
        # To half types by way of float: two roundings, the first to 13 bits more.
        allowed = half_ulp(exact, dtype) * (1 + 2.0**-11) + slack
        wrong = ~(np.abs(got - exact) <= allowed)
        if wrong.any():
            first = int(wrong.argmax())
            yield f"{wrong.sum()} weights off, the first is {got[first]}, not {exact[first]}"

    def _chunk_problems(self, moved: list[np.ndarray]) -> Iterator[str]:
        """Chunk by chunk: the same bits as all at once, and nothing beyond the chunk."""
        for c, (tensor, begin, end) in enumerate(self.chunks):
            self._reset()
            self.module.perturbation_apply(self.options, c, c + 1)
            expected = [bits.copy() for bits in self.inputs.weights]
            expected[tensor][begin:end] = moved[tensor][begin:end]
            yield from self._weight_problems(f"the step of chunk {c}", expected)
            yield from self._stash_problems(f"the step of chunk {c}", [c])
            self.module.perturbation_restore(self.options, c, c + 1)
            yield from self._weight_problems(f"the restoring of chunk {c}", self.inputs.weights)

    def _weight_problems(self, when: str, expected: list[np.ndarray]) -> Iterator[str]:
        for t, (array, bits) in enumerate(zip(self.weights, expected, strict=True)):
            if not _same(array, bits):
                yield f"tensor {t} after {when}: {(array != bits).sum()} weights have other bits than expected"

    def _stash_problems(self, when: str, chunks: Any) -> Iterator[str]:
        """The stash has the weights of `chunks`, and `FILL` everywhere else."""
        expected = [np.full(bits.nbytes, FILL, np.uint8).view(bits.dtype) for bits in self.inputs.weights]
        for tensor, begin, end in (self.chunks[c] for c in chunks):
            expected[tensor][begin:end] = self.inputs.weights[tensor][begin:end]
        for t, (array, bits) in enumerate(zip(self.stash, expected, strict=True)):
            if not _same(array, bits):
                yield f"stash {t} after {when}: {(array != bits).sum()} entries have other bits than expected"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit: NaNs equal only themselves, and 0 not -0."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _off(name: str, got: float, expected: float) -> Iterator[str]:
    if math.isfinite(expected):
        if not abs(got - expected) <= NORM_TOLERANCE * expected + 20 * SMALLEST:  # parts may be subnormal
            yield f"{name} is {got!r}, not {expected!r}"
    elif math.isfinite(got):
        yield f"{name} is {got!r}, of entries that are not finite"

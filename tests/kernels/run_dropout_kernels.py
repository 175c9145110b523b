"""Dropout's part of run_cpu_kernels.py: every case in guarded memory; values, gradients, and what else was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from dropout_kernel_cases import EPS, DropoutInputs, layer_norm
from guarded_memory import Allocator, untouched
from numpy_oracle import STORAGE, widen

# Relative to the largest entry of what is expected, or to 1.
TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-10}


class DropoutRun:
    """One case with its arrays in guarded memory: all five kernels, and what is wrong with what they wrote."""

    def __init__(self, module: Any, inputs: DropoutInputs, allocate: Allocator) -> None:
        self.module, self.inputs, self.case, self.allocate = module, inputs, inputs.case, allocate
        case = self.case
        self.wide = np.dtype(np.float64 if case.dtype == "float64" else np.float32)
        seed = self.place(np.array([inputs.seed], np.int64)) if case.p > 0 else None
        self.x = self.place(inputs.x_stored)
        self.bias_of_x = self.place(inputs.x_bias) if case.biased else None
        self.options: dict[str, Any] = {"dtype": case.dtype, "p": case.p, "seed": seed, "x": self.x}
        self.step = module.dropout_chunk_rows(case.rows)
        self.chunks = -(-case.rows // self.step)

    def place(self, values: np.ndarray) -> np.ndarray:
        array = self.allocate(values.shape, values.dtype)
        array[...] = values
        return array

    def rows(self) -> np.ndarray:
        return self.allocate((self.case.rows, self.case.cols), STORAGE[self.case.dtype])

    def problems(self) -> Iterator[str]:
        if self.case.p > 0:
            yield from self._dropout_problems()
        yield from self._relu_problems()
        yield from self._norm_problems()

    def _call(
        self, name: str, units: int, make: Callable[[], dict[str, np.ndarray]], size: int
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """What a kernel writes for all units, and what is wrong where it runs for one unit in the middle alone.

        Args:
            size: rows, or elements, of a unit; an output has that many for each, except sums and flat ones.
        """
        whole, part = make(), make()
        kernel = getattr(self.module, name)
        kernel({**self.options, **whole}, 0, units)
        wrong = [f"{name}: {key} has unwritten entries" for key, array in whole.items() if untouched(array).any()]
        if units == 0:
            return whole, wrong
        middle = units // 2
        kernel({**self.options, **part}, middle, middle + 1)
        for key, array in part.items():
            per_unit = 1 if key == "sums" else size
            mine = slice(middle * per_unit, (middle + 1) * per_unit)
            if array[mine].tobytes() != whole[key][mine].tobytes():
                wrong.append(f"{name}: {key} of a unit depends on the units computed with it")
            if not untouched(np.delete(array, mine, 0)).all():
                wrong.append(f"{name}: {key} was written outside the unit asked for")
        return whole, wrong

    def _dropout_problems(self) -> Iterator[str]:
        count = self.case.rows * self.case.cols
        flat = lambda: {"out": self.rows().reshape(-1)}  # noqa: E731
        written, wrong = self._call("dropout", count, flat, 1)
        yield from wrong
        expected = self.inputs.x * self.inputs.mask
        yield from self._off("dropout", written["out"].reshape(expected.shape), expected)

    def _relu_problems(self) -> Iterator[str]:
        inputs, case = self.inputs, self.case
        self.options["bias"] = self.bias_of_x
        written, wrong = self._call("relu_dropout", case.rows, lambda: {"out": self.rows()}, 1)
        yield from wrong
        yield from self._off("relu", written["out"], np.maximum(inputs.branch, 0) * inputs.mask)
        kept = widen(written["out"], case.dtype) > 0
        expected = inputs.grad * kept * (inputs.mask.max(initial=1.0) if case.p > 0 else 1.0)
        self.options |= {"grad": self.place(inputs.grad_stored), "out": self.place(written["out"])}
        make = lambda: {"grad_x": self.rows(), "sums": self._sums(1)}  # noqa: E731
        written, wrong = self._call("relu_dropout_backward", self.chunks, make, self.step)
        yield from wrong
        yield from self._off("grad_x of relu", written["grad_x"], expected)
        yield from self._off_sum("grad_bias of relu", written["sums"][:, 0], expected)

    def _norm_problems(self) -> Iterator[str]:
        inputs, case = self.inputs, self.case
        weight, bias = inputs.weight.astype(np.float64), inputs.bias.astype(np.float64)
        self.options |= {"x_bias": self.bias_of_x, "residual": self.place(inputs.residual_stored), "eps": EPS}
        self.options |= {"weight": self.place(inputs.weight), "bias": self.place(inputs.bias)}
        make = lambda: {"y": self.rows(), "moments": self.allocate((case.rows, 2), self.wide)}  # noqa: E731
        written, wrong = self._call("dropout_norm_forward", case.rows, make, 1)
        yield from wrong
        y, xhat, rstd = layer_norm(inputs.residual + inputs.branch * inputs.mask, weight, bias)
        yield from self._off("y", written["y"], y)

        grad = inputs.grad
        a = grad * weight
        grad_s = rstd * (a - a.mean(1, keepdims=True) - xhat * (a * xhat).mean(1, keepdims=True))
        self.options |= {"grad": self.place(inputs.grad_stored), "moments": self.place(written["moments"])}
        self.options["grad_x"] = None
        names = ["grad_residual", *(["grad_x"] if case.p > 0 else [])]
        make = lambda: {**{name: self.rows() for name in names}, "sums": self._sums(3)}  # noqa: E731
        written, wrong = self._call("dropout_norm_backward", self.chunks, make, self.step)
        yield from wrong
        yield from self._off("grad_residual", written["grad_residual"], grad_s)
        if case.p > 0:
            yield from self._off("grad_x", written["grad_x"], grad_s * inputs.mask)
        for i, terms in enumerate((grad_s * inputs.mask, grad * xhat, grad)):
            yield from self._off_sum(f"sum {i}", written["sums"][:, i], terms)

    def _sums(self, kinds: int) -> np.ndarray:
        return self.allocate((self.chunks, kinds, self.case.cols), self.wide)

    def _off(self, name: str, got: np.ndarray, expected: np.ndarray) -> Iterator[str]:
        error = np.abs(widen(got, self.case.dtype) - expected).max(initial=0)
        limit = TOLERANCE[self.case.dtype] * max(1.0, np.abs(expected).max(initial=0))
        if not error <= limit:
            yield f"{name} off by {error:.3g}, more than {limit:.3g}"

    def _off_sum(self, name: str, parts: np.ndarray, terms: np.ndarray) -> Iterator[str]:
        error = np.abs(parts.astype(np.float64).sum(0) - terms.sum(0)).max(initial=0)
        tolerance = TOLERANCE["float64" if self.case.dtype == "float64" else "float32"]
        if not error <= tolerance * max(1.0, np.abs(terms).sum(0).max(initial=0)):
            yield f"{name} off by {error:.3g}"

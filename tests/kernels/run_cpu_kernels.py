"""Runs the CPU kernels over the edge cases in a process of its own, which a stray write or a sanitizer may end.

    python run_cpu_kernels.py MODULE_FOLDER OUTPUTS.npz MEMORY

MODULE_FOLDER holds mmer_kernels_numpy; OUTPUTS gets the weights of every case; MEMORY is a key of
`guarded_memory.ALLOCATORS`. Prints one line of JSON, ``{"isa": ..., "cases": number, "failures": ["case: what was
wrong", ...]}``, and to stderr every case before it runs, so that the last one tells where the process ended.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import attention_kernel_cases
import dropout_kernel_cases
import numpy as np
import perturbation_kernel_cases
from attention_kernel_cases import AttentionInputs
from cpu_kernel_cases import ROWS, Inputs, cases
from dropout_kernel_cases import DropoutInputs
from guarded_memory import ALLOCATORS, Allocator, untouched
from numpy_oracle import STORAGE, backward, widen
from perturbation_kernel_cases import PerturbationInputs
from run_attention_kernels import AttentionRun
from run_dropout_kernels import DropoutRun
from run_perturbation_kernels import PerturbationRun

GAP = 5  # entries between two strided rows, all NaN
MOST_SWEEPS = 10
# Of a weight, absolute; of a gradient, in the units of `numpy_oracle.Gradients.scale`.
WEIGHT_TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}
GRADIENT_TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 2**-7, "float16": 2**-9}
SMALLEST = {"float64": 0.0, "float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-24}  # gradients come near float16's


class Run:
    """One case with its arrays in guarded memory: both kernels, and what is wrong with what they wrote."""

    def __init__(self, module: Any, inputs: Inputs, allocate: Allocator) -> None:
        self.module, self.inputs, self.case, self.allocate = module, inputs, inputs.case, allocate
        self.scores = self._place(inputs.scores_stored)
        self.grads = self._place(inputs.grads_stored)
        self.k = float(inputs.k[0]) if self.case.k == "number" else self._copy(inputs.k)
        self.options: dict[str, Any] = {
            "dtype": self.case.dtype,
            "largest": self.case.largest,
            "tau": self._copy(inputs.tau) if self.case.tau_rows else self.case.tau,
            "lengths": None if inputs.lengths is None else self._copy(inputs.lengths),
            "mask": None if inputs.mask is None else self._place(inputs.mask),
        }
        self.grad_threshold = self._copy(inputs.grad_threshold) if self.case.strided else None

    def _copy(self, values: np.ndarray) -> np.ndarray:
        array = self.allocate(values.shape, values.dtype)
        array[...] = values
        return array

    def _place(self, values: np.ndarray) -> np.ndarray:
        """A copy whose rows are `GAP` entries apart if the case is strided."""
        rows, n = values.shape
        array = self.allocate((rows, n + GAP) if self.case.strided else (rows, n), values.dtype)[:, :n]
        array[...] = values
        return array

    def _outputs(self, *columns: int) -> list[np.ndarray]:
        """(ROWS, n) in the storage type, then float64 (ROWS, columns) each; nothing written yet."""
        main = self.allocate((ROWS, self.case.n), STORAGE[self.case.dtype])
        return [main, *(self.allocate((ROWS, c), np.dtype(np.float64)) for c in columns)]

    def forward(self, begin: int = 0, end: int = ROWS) -> list[np.ndarray]:
        out = self._outputs(1, 2)
        rows = {"begin": begin, "end": end}
        iterations = self.case.sinkhorn
        self.module.soft_topk_forward(
            self.scores, *out, k=self.k, sinkhorn_iterations=iterations, **rows, **self.options
        )
        return out

    def backward(self, threshold: np.ndarray, begin: int = 0, end: int = ROWS) -> list[np.ndarray]:
        out = self._outputs(1, 1)
        rows = {"begin": begin, "end": end}
        self.module.soft_topk_backward(
            self.grads, self.scores, threshold, *out, grad_threshold=self.grad_threshold, **rows, **self.options
        )
        return out

    def problems(self) -> Iterator[str]:
        written = self.forward()
        self.weights = widen(written[0], self.case.dtype)
        yield from self._memory_problems("forward", written, self.forward)
        yield from self._weight_problems(written[1][:, 0], written[2])
        threshold = self._copy(written[1][:, 0])
        gradients = self.backward(threshold)
        yield from self._memory_problems("backward", gradients, functools.partial(self.backward, threshold))
        yield from self._gradient_problems(threshold, gradients)

    def _memory_problems(
        self, name: str, whole: list[np.ndarray], kernel: Callable[[int, int], list[np.ndarray]]
    ) -> Iterator[str]:
        for i, (array, middle) in enumerate(zip(whole, kernel(1, 2), strict=True)):
            if untouched(array).any():
                yield f"{name}: output {i} has unwritten entries"
            if not untouched(middle[[0, 2]]).all():
                yield f"{name}: output {i} was written outside the rows asked for"
            if middle[1].tobytes() != array[1].tobytes():
                yield f"{name}: output {i} of a row depends on the rows computed with it"

    def _weight_problems(self, threshold: np.ndarray, certificate: np.ndarray) -> Iterator[str]:
        tolerance = WEIGHT_TOLERANCE[self.case.dtype]
        for row, expected in enumerate(self.inputs.weights):
            got, (residual, sweeps) = self.weights[row], certificate[row]
            if not np.allclose(got, expected, rtol=0, atol=tolerance, equal_nan=True):
                error = np.abs(got - expected).max()
                yield f"row {row}: weights off by {error:.3g}, {np.isnan(got).sum()} of them NaN"
            if np.isnan(expected).any():
                if not (np.isnan(residual) and np.isnan(threshold[row])):
                    yield f"row {row}: a NaN row with residual {residual} and threshold {threshold[row]}"
            elif self.case.sinkhorn == 0:
                # k may go beyond the finite entries: all that there is, is taken.
                missing = min(0.0, np.isfinite(self.inputs.scores[row]).sum() - self.inputs.k[row])
                if not abs(residual - missing) <= 1e-5 * self.case.n:
                    yield f"row {row}: residual {residual}"
                if not sweeps <= MOST_SWEEPS:
                    yield f"row {row}: {sweeps:.0f} sweeps"

    def _gradient_problems(self, threshold: np.ndarray, gradients: list[np.ndarray]) -> Iterator[str]:
        inputs, dtype = self.inputs, self.case.dtype
        scalar_tolerance = 10 * GRADIENT_TOLERANCE["float64" if dtype == "float64" else "float32"]
        for row, got in enumerate(widen(gradients[0], dtype)):
            valid, tau = inputs.valid[row], inputs.tau[row]
            s, g = inputs.scores[row, valid], inputs.grads[row, valid]
            expected = backward(s, g, threshold[row], inputs.grad_threshold[row], tau, inputs.sign)
            if got[~valid].any():
                yield f"row {row}: padding has a gradient"
            error = np.abs(got[valid] - expected.scores).max(initial=0)
            if not error <= GRADIENT_TOLERANCE[dtype] * expected.scale + SMALLEST[dtype] + 1e-15 / tau:
                yield f"row {row}: grad_scores off by {error:.3g}, in units of {expected.scale:.3g}"
            if not expected.slope > 1e-12:  # a hard selection: the mean is one of rounding errors
                continue
            largest = np.abs(g).max()
            for name, scalars, value, scale in (
                ("k", gradients[1], expected.k, largest),
                ("tau", gradients[2], expected.tau, largest * expected.slope / tau),
            ):
                if not abs(scalars[row, 0] - value) <= scalar_tolerance * max(abs(value), scale):
                    yield f"row {row}: grad_{name} is {scalars[row, 0]:.9g}, not {value:.9g}"


def main(module_folder: str, outputs: str, memory: str) -> None:
    sys.path.insert(0, module_folder)
    import mmer_kernels_numpy as module

    failures, weights = [], {}
    for case in cases():
        print(case, file=sys.stderr)
        run = Run(module, Inputs(case), ALLOCATORS[memory]())
        failures += [f"{case}: {problem}" for problem in run.problems()]
        weights[repr(case)] = run.weights
    np.savez(outputs, **weights)
    count = len(weights)
    for attention_case in attention_kernel_cases.cases():
        print(attention_case, file=sys.stderr)
        attention = AttentionRun(module, AttentionInputs(attention_case), ALLOCATORS[memory]())
        failures += [f"{attention_case}: {problem}" for problem in attention.problems()]
        count += 1
    for dropout_case in dropout_kernel_cases.cases():
        print(dropout_case, file=sys.stderr)
        dropout = DropoutRun(module, DropoutInputs(dropout_case), ALLOCATORS[memory]())
        failures += [f"{dropout_case}: {problem}" for problem in dropout.problems()]
        count += 1
    for perturbation_case in perturbation_kernel_cases.cases():
        print(perturbation_case, file=sys.stderr)
        perturbation = PerturbationRun(module, PerturbationInputs(perturbation_case), ALLOCATORS[memory]())
        failures += [f"{perturbation_case}: {problem}" for problem in perturbation.problems()]
        count += 1
    print(json.dumps({"isa": module.cpu_isa(), "cases": count, "failures": failures}))


if __name__ == "__main__":
    main(*sys.argv[1:])

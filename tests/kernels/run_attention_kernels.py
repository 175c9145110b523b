"""The attention half of run_cpu_kernels.py: every case in guarded memory, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from attention_kernel_cases import SEED, AttentionInputs
from guarded_memory import Allocator, untouched
from numpy_oracle import STORAGE, widen

# Relative to the largest entry, at least 1.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1.5e-3}
GRADIENT_TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


class AttentionRun:
    """One case: its arrays in guarded memory, both kernels, and what is wrong with what they wrote."""

    def __init__(self, module: Any, inputs: AttentionInputs, allocate: Allocator) -> None:
        self.module, self.inputs, self.case, self.allocate = module, inputs, inputs.case, allocate
        case = self.case
        queries, keys = inputs.query_counts, inputs.key_counts
        self.counts = {"q": queries, "out": queries, "lse": queries, "grad_out": queries, "grad_lse": queries,
                       "grad_q": queries}  # fmt: skip
        self.options: dict[str, Any] = {
            "dtype": case.dtype, "causal": case.causal, "scale": case.width**-0.5, "dropout_p": case.dropout_p,
            "exact": case.exact, "seed": self._copy(np.array([SEED])), "max_queries": case.queries,
            "max_keys": case.keys,
        }  # fmt: skip
        for name, x in inputs.stored.items():
            self.options[name] = self._copy(self._laid_out(name, x))
        if inputs.m is not None:
            self.options["key_weights"] = self._copy(self._laid_out("key_weights", inputs.m))
        self.options["grad_lse"] = self._copy(self._laid_out("grad_lse", inputs.grad_lse))
        for name, x in (("mask", inputs.mask), ("bias", inputs.bias)):
            self.options[name] = None if x is None else self._copy(x)
        if case.packed:
            for name, counts in (("cu_seqlens_q", queries), ("cu_seqlens_k", keys)):
                self.options[name] = self._copy(np.concatenate([[0], counts.cumsum()]).astype(np.int32))
        elif case.padding == "lengths":
            self.options["lengths"], self.options["query_lengths"] = self._copy(keys), self._copy(queries)

    def _laid_out(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.inputs.pack(x, self.counts.get(name, self.inputs.key_counts)) if self.case.packed else x

    def _copy(self, values: np.ndarray) -> np.ndarray:
        array = self.allocate(values.shape, values.dtype)
        array[...] = values
        return array

    def _output(self, name: str, dtype: np.dtype) -> np.ndarray:
        shape = self._laid_out(name, self.inputs.expected[name]).shape if name != "grad_bias" else (
            self.inputs.expected[name].shape)  # fmt: skip
        return self.allocate(shape, dtype)

    def problems(self) -> Iterator[str]:
        case, options = self.case, self.options
        stored, single = STORAGE[case.dtype], np.dtype(np.float32)
        options["out"], options["lse"] = self._output("out", stored), self._output("lse", single)
        self.module.attention_forward(options)
        yield from self._compare("out", TOLERANCE[case.dtype])
        yield from self._compare("lse", 5e-6)
        for name in ("grad_q", "grad_k", "grad_v"):
            options[name] = self._output(name, stored)
        if self.inputs.m is not None:
            options["grad_weights"] = self._output("grad_weights", single)
        if self.inputs.bias is not None:
            options["grad_bias"] = self._output("grad_bias", single)
        chunks = self.module.attention_key_chunks(options)
        if chunks > 1:
            options["parts"] = self.allocate((chunks, *options["grad_q"].shape), single)
        if case.heads == case.key_heads:
            options["columns"] = self.allocate((case.batch, chunks, 3, case.heads, case.width), single)
        self.module.attention_backward(options)
        if case.heads == case.key_heads:
            yield from self._compare_columns(GRADIENT_TOLERANCE[case.dtype])
        for name in ("grad_q", "grad_k", "grad_v", "grad_weights", "grad_bias"):
            if name in options:
                yield from self._compare(name, GRADIENT_TOLERANCE[case.dtype])

    def _compare_columns(self, tolerance: float) -> Iterator[str]:
        written = self.options["columns"]
        if untouched(written).any():
            yield "columns has unwritten entries"
        expected = np.stack([self.inputs.expected[f"grad_{x}"].sum((0, 2)) for x in "qkv"])
        size = max(1.0, max(float(np.abs(self.inputs.expected[f"grad_{x}"]).sum((0, 2)).max()) for x in "qkv"))
        error = float(np.abs(written.astype(np.float64).sum((0, 1)) - expected).max())
        if not error <= tolerance * size:
            yield f"columns off by {error:.3g}, allowed {tolerance * size:.3g}"

    def _compare(self, name: str, tolerance: float) -> Iterator[str]:
        written, expected = self.options[name], self.inputs.expected[name]
        if name != "grad_bias":
            expected = self._laid_out(name, expected)
        if untouched(written).any():
            yield f"{name} has unwritten entries"
        narrow = name in ("out", "grad_q", "grad_k", "grad_v")
        got = widen(written, self.case.dtype) if narrow else written.astype(np.float64)
        finite = np.isfinite(expected)
        if not np.array_equal(got[~finite], expected[~finite]):
            yield f"{name}: infinities differ"
        got, expected = got[finite], expected[finite]
        size = max(1.0, float(np.abs(expected).max(initial=0)))
        error = float(np.abs(got - expected).max(initial=0)) if np.isfinite(got).all() else np.inf
        if not error <= tolerance * size:
            yield f"{name} off by {error:.3g}, allowed {tolerance * size:.3g}"

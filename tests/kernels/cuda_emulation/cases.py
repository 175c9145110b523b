"""Attention on the emulated kernels beside the float64 reference: memory with guard pages, cases, the comparison."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cuda_emulation import launch
from guarded_memory import GuardPages
from torch import Tensor

from mmer_fast.ops.attention_reference import attention

NAN, INF = math.nan, math.inf
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Error in units of the largest expected entry, of the output and of gradients. Half types round p, ds and the output,
# from which delta comes, to their own precision.
TOLERANCES = {F32: (2e-6, 4e-6), BF16: (8e-3, 1.6e-2), F16: (1e-3, 2e-3)}
LSE_TOLERANCE = 4e-6


class Machine(launch.Emulator):
    """The emulator, on memory with guard pages."""

    def __init__(self, library: launch.Path) -> None:
        super().__init__(library)
        self.pages = GuardPages()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Filled with NaN."""
        stored = {2: np.dtype(np.int16), 4: np.dtype(np.float32)}[dtype.itemsize]
        return torch.from_numpy(self.pages(shape, stored)).view(dtype)

    def guarded(self, x: Tensor | None) -> Tensor | None:
        """A copy with the same strides, which ends where its last entry does."""
        if x is None or x.numel() == 0:
            return x
        extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        stored = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[x.dtype.itemsize]
        block = torch.from_numpy(self.pages((extent,), np.dtype(stored))).view(x.dtype)
        once = [1 if stride == 0 else n for n, stride in zip(x.shape, x.stride(), strict=True)]
        block.as_strided(once, x.stride()).copy_(x.as_strided(once, x.stride()))
        return block.as_strided(x.shape, x.stride())


@dataclass
class Case:
    """Padded inputs of the operator; `packed` has the kernels see them packed, by the lengths."""

    q: Tensor  # [B, H, L, D]
    k: Tensor  # [B, Hk, S, D]
    v: Tensor
    key_weights: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    lengths: Tensor | None = None
    query_lengths: Tensor | None = None
    causal: bool = False
    dropout_p: float = 0.0
    seed: int = 2**63 - 12345678901
    exact_zero_weight_grad: bool = False
    packed: bool = False
    grad_lse: bool = True

    def options(self) -> dict[str, Any]:
        names = ("mask", "lengths", "query_lengths", "causal", "dropout_p", "seed", "exact_zero_weight_grad")
        return {name: getattr(self, name) for name in names}

    def call(self, machine: Machine) -> launch.Call:
        """What the kernels get: guarded copies."""
        call = launch.Call(self.q, self.k, self.v, self.key_weights, self.mask, self.bias, causal=self.causal)
        call.lengths, call.query_lengths = self.lengths, self.query_lengths
        call.scale, call.dropout_p = self.q.shape[-1] ** -0.5, self.dropout_p
        call.exact_zero_weight_grad = self.exact_zero_weight_grad
        call.seed = torch.tensor([self.seed]) if self.dropout_p > 0 else None
        if self.packed:
            call.q, call.k, call.v = self.pack_queries(self.q), self.pack_keys(self.k), self.pack_keys(self.v)
            if self.key_weights is not None:
                call.key_weights = self.pack_keys(self.key_weights)
            call.cu_seqlens_q, call.cu_seqlens_k = _starts(self.query_lengths), _starts(self.lengths)
            call.max_queries, call.max_keys = int(self.query_lengths.max()), int(self.lengths.max())
            call.lengths = call.query_lengths = None
        for name, value in vars(call).items():
            if isinstance(value, Tensor):
                setattr(call, name, machine.guarded(value))
        return call

    def pack_queries(self, x: Tensor) -> Tensor:
        return _pack(x, self.query_lengths) if self.packed else x

    def pack_keys(self, x: Tensor) -> Tensor:
        return _pack(x, self.lengths) if self.packed else x


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()


def _pack(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, H, T, ...) to (sum of the lengths, H, ...), or (B, T) to (sum of the lengths,)."""
    rows = x if x.dim() == 2 else x.transpose(1, 2)
    return torch.cat([row[: int(n)] for row, n in zip(rows, lengths, strict=True)])


def qkv(dtype: torch.dtype, batch: int, heads: int, key_heads: int, queries: int, keys: int, width: int) -> Case:
    q = torch.randn(batch, heads, queries, width).to(dtype)
    k, v = (torch.randn(batch, key_heads, keys, width).to(dtype) for _ in range(2))
    return Case(q, k, v)


def weights(*shape: int) -> Tensor:
    """In [0, 1], a quarter of them 0."""
    return torch.rand(shape) * (torch.rand(shape) > 0.25)


def near(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == expected.shape, what
    if expected.numel() == 0:
        return
    expected = expected.detach()
    size = max(float(expected.abs().max()), 1e-3)
    error = float((got.double() - expected).abs().nan_to_num(INF).max())
    assert error <= tolerance * size, f"{what}: error {error / size:.2e}, allowed {tolerance:.2e}"


@dataclass
class Results:
    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]


def same(first: Tensor, second: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def run(machine: Machine, case: Case, grad: Tensor, grad_lse: Tensor | None) -> Results:
    """Forward and backward, twice: the results must not depend on the order of events."""
    call = case.call(machine)
    upstream = machine.guarded(case.pack_queries(grad))
    upstream_lse = None if grad_lse is None else machine.guarded(case.pack_queries(grad_lse).float())
    runs = []
    for seed in (1, 2):
        machine.seed(seed)
        out, lse = machine.forward(call)
        needs = call.key_weights is not None, call.bias is not None
        grads = machine.backward(call, upstream, upstream_lse, out, lse, *needs)
        runs.append((out, lse, *grads))
    for first, second in zip(*runs, strict=True):
        assert same(first, second), "two runs differ"
    out, lse, *grads = runs[0]
    return Results(out, lse, dict(zip(("q", "k", "v", "weights", "bias"), grads, strict=True)))


def check(machine: Machine, case: Case, overflows: AbstractSet[str] = frozenset(), rounding: float = 1.0) -> Results:
    """The kernels beside the reference: output, log-sum-exp and every gradient but those that `overflows` names.

    `rounding`: times the usual errors of gradients, where a log-sum-exp is far from 0.

    The kernels' upstream gradients are NaN at queries without a key, which have no gradient whatever these hold.
    """
    leaves = {"q": case.q, "k": case.k, "v": case.v, "weights": case.key_weights, "bias": case.bias}
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items() if x is not None}
    per_head = None
    if case.key_weights is not None:  # a gradient for each head, as the kernels give it
        shared = case.key_weights[:, None] if case.key_weights.dim() == 2 else case.key_weights
        per_head = shared.expand(-1, case.q.shape[1], -1).double().clone().requires_grad_()
        wide["weights"] = per_head
    out, lse = attention(wide["q"], wide["k"], wide["v"], per_head, bias=wide.get("bias"), **case.options())
    finite = lse > -INF
    grad = torch.randn(case.q.shape).to(case.q.dtype).masked_fill(~finite[..., None], 0.0)
    grad_lse = torch.randn(lse.shape) * finite if case.grad_lse else None
    loss = (out * grad.double()).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(~finite, 0.0) * grad_lse.double()).sum()
    expected = dict(zip(wide, torch.autograd.grad(loss, list(wide.values())), strict=True))

    grad = grad.masked_fill(~finite[..., None], NAN)
    got = run(machine, case, grad, None if grad_lse is None else grad_lse.masked_fill(~finite, NAN))
    output_tolerance, gradient_tolerance = TOLERANCES[case.q.dtype]
    gradient_tolerance *= rounding
    near(got.out, case.pack_queries(out), output_tolerance, "output")
    lse, finite = case.pack_queries(lse), case.pack_queries(finite)
    assert torch.equal(got.lse > -INF, finite)
    near(got.lse.masked_fill(~finite, 0.0), lse.masked_fill(~finite, 0.0), LSE_TOLERANCE, "log-sum-exp")
    for name, gradient in expected.items():
        if name in overflows:
            continue
        packed = case.pack_queries if name == "q" else (lambda x: x) if name == "bias" else case.pack_keys
        near(got.grads[name], packed(gradient), gradient_tolerance, f"gradient of {name}")
    return got

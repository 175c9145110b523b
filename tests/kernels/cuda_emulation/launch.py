"""Runs kernels/cuda/*.cu on the host (cuda_runtime.h says how): builds them; hands attention its tensors by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[2] / "kernels"
ENTRIES = {"attention": "entry.cpp", "perturbation": "perturbation_entry.cpp", "soft_topk": "soft_topk_entry.cpp"}
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # an unaligned vector ends a launch
FLAGS += ["-D__CUDA_ARCH__=900"]  # the first with clusters
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def build(folder: Path, operator: str = "attention") -> Path:
    """The shared library of an operator's kernels, built again where a source changed."""
    emulation = [HERE / name for name in ("device.cpp", "fibers.cpp", ENTRIES[operator])]
    sources = [*emulation, *sorted((KERNELS / "cuda").glob(f"{operator}*.cu"))]
    headers = [*HERE.glob("*.h"), *(KERNELS / "common").glob("*.h"), KERNELS / "cuda" / "attention_warp.cuh"]
    headers += (KERNELS / "cuda").glob(f"{operator}*.*h")
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*sources, *headers]):
        digest.update(path.name.encode() + path.read_bytes())
    library = folder / f"lib{operator}_{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"

    def compile_source(source: Path) -> str:
        made = folder / f"{operator}_{source.name}.o"
        run([str(compiler()), *FLAGS, "-I", str(HERE), "-x", "c++", "-c", str(source), "-o", str(made)])
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compile_source, sources))
    run([str(compiler()), "-shared", *made, "-o", str(library)])
    return library


@dataclass
class Call:
    """The inputs of the operator: padded (B, H, L, D), or packed (T, H, D) with both cu_seqlens."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_weights: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    lengths: Tensor | None = None
    query_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_queries: int = 0
    max_keys: int = 0
    causal: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    exact_zero_weight_grad: bool = False


class Emulator:
    """The launchers of kernels/cuda/attention.h."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a result."""
        return torch.empty(shape, dtype=dtype)

    def seed(self, seed: int) -> None:
        """Of the order of the warps and of when copies land."""
        self._library.emulation_seed(ctypes.c_uint64(seed))

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        out = self.empty(tuple(call.q.shape), call.q.dtype)
        lse = self.empty(tuple(call.q.shape[:-1]), torch.float32)
        self._run("attention_forward", call, [*_tokens(out), *_numbers(lse)])
        return out, lse

    def backward(
        self,
        call: Call,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        need_weights: bool,
        need_bias: bool,
    ) -> tuple[Tensor, ...]:
        heads = call.q.shape[1]
        if call.cu_seqlens_k is not None:
            weights_shape: tuple[int, ...] = (call.k.shape[0], heads)
        else:
            weights_shape = (call.k.shape[0], heads, call.k.shape[2])
        grad_q = self.empty(tuple(call.q.shape), call.q.dtype)
        grad_k, grad_v = (self.empty(tuple(call.k.shape), call.q.dtype) for _ in range(2))
        grad_weights = self.empty(weights_shape if need_weights else (0,), torch.float32)
        bias_shape = tuple(call.bias.shape) if need_bias and call.bias is not None else (0,)
        grad_bias = self.empty(bias_shape, torch.float32)
        delta = self.empty(tuple(lse.shape), torch.float32)
        arguments = [*_tokens(grad_out), *_tokens(out), *_numbers(lse), *_numbers(grad_lse)]
        arguments += [*_tokens(grad_q), *_tokens(grad_k), *_tokens(grad_v), *_numbers(grad_weights)]
        arguments += [grad_bias.data_ptr() if need_bias else 0, *_numbers(delta)]
        self._run("attention_backward", call, arguments)
        return grad_q, grad_k, grad_v, grad_weights, grad_bias

    def _run(self, name: str, call: Call, results: list[int]) -> None:
        numbers = [*_inputs(call), *results]
        array = (ctypes.c_int64 * len(numbers))(*numbers)
        status = getattr(self._library, name)(array, ctypes.c_double(call.scale), ctypes.c_double(call.dropout_p))
        assert status == 0, f"{name}: error {status}"


def _tokens(x: Tensor) -> list[int]:
    """Pointer and strides of (B, H, T, D) or packed (T, H, D)."""
    strides = x.stride()[:-1]
    batch, head, token = strides if len(strides) == 3 else (0, strides[1], strides[0])
    return [x.data_ptr(), batch, head, token]


def _numbers(x: Tensor | None) -> list[int]:
    """Pointer and strides of (B, H, T) or packed (T, H)."""
    if x is None or x.shape == (0,):
        return [0, 0, 0, 0]
    return _tokens(x[..., None])


def _key_weights(call: Call) -> list[int]:
    weights, packed = call.key_weights, call.cu_seqlens_k is not None
    if weights is None:
        return _numbers(None)
    if weights.dim() == (1 if packed else 2):
        weights = weights.unsqueeze(1).expand(-1, call.q.shape[1], *weights.shape[1:])
    return _numbers(weights)


def _bias(bias: Tensor | None) -> list[int]:
    if bias is None:
        return [0] * 8
    strides = [stride if size > 1 else 0 for size, stride in zip(bias.shape, bias.stride(), strict=True)]
    return [bias.data_ptr(), *bias.shape[:3], *strides]


def _inputs(call: Call) -> list[int]:
    if call.cu_seqlens_k is not None:
        batch, queries, keys = len(call.cu_seqlens_k) - 1, call.max_queries, call.max_keys
    else:
        batch, queries, keys = call.q.shape[0], call.q.shape[2], call.k.shape[2]

    def pointer(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    numbers = [DTYPES[call.q.dtype], batch, call.q.shape[1], call.k.shape[1], queries, keys, call.q.shape[-1]]
    numbers += [*_tokens(call.q), *_tokens(call.k), *_tokens(call.v), *_key_weights(call)]
    numbers += [pointer(call.mask), 0 if call.mask is None else call.mask.stride(0), *_bias(call.bias)]
    numbers += [pointer(x) for x in (call.lengths, call.query_lengths, call.cu_seqlens_q, call.cu_seqlens_k)]
    return [*numbers, int(call.causal), pointer(call.seed), int(call.exact_zero_weight_grad)]

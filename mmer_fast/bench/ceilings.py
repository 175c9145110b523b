"""What the machine can do, measured by torch in the process that measures the rest.

Three ceilings: the bandwidth of a copy, the rate of a matrix product by dtype (by the faster of torch's two, see
`mmer_fast.ops.linear`), and the rate of a sigmoid. Copy and sigmoid are swept over working sets from the first cache to
main memory: what fits into a cache has another ceiling than what does not. They are what torch reaches here, not what a
data sheet says, so that a call can be above one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mmer_fast.bench import timing
from mmer_fast.bench.timing import Call
from mmer_fast.ops.linear import linear

Ceilings = dict[str, Any]

MATMUL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_ENTRIES = {"cpu": 2**24, "cuda": 2**28}
SWEEP_ENTRIES = {"cpu": (2**12, 2**15, 2**18, 2**21, 2**24), "cuda": (2**16, 2**19, 2**22, 2**25, 2**28)}
_FLOAT32 = 4  # bytes


def measure(device: str) -> Ceilings:
    """The ceilings of a device, for the header of a result.

    Returns:
        ``copy_gbps``: 10^9 bytes a second, read and written, of a copy far larger than any cache;
        ``matmul_gflops``: dtype → 10^9 FLOP a second of square matrices;
        ``sweep``: for each number of float32 ``entries`` the ``copy_gbps`` and the ``gsigmoids``, 10^9 sigmoids a
        second.
    """
    products = matrix_products(MATMUL_DTYPES[device], device)
    return {
        "copy_gbps": copy_bandwidth(device),
        "matmul_gflops": {name: matmul_gflops(_seconds(call, device), device) for name, call in products.items()},
        "sweep": [_sweep_point(entries, device) for entries in SWEEP_ENTRIES[device]],
    }


def _seconds(call: Call, device: str) -> float:
    """Of the best of three turns: a ceiling is what the machine can do, not what others left of it."""
    return min(timing.TURNS[device](call, 0.05)[0] for _ in range(3))


def _sweep_point(entries: int, device: str) -> dict[str, float]:
    source = torch.linspace(-4.0, 4.0, entries, device=device)
    target = torch.empty_like(source)
    copied = _seconds(lambda: target.copy_(source), device)
    evaluated = _seconds(lambda: torch.sigmoid(source, out=target), device)
    return {
        "entries": entries,
        "copy_gbps": 2 * _FLOAT32 * entries / copied * 1e-9,
        "gsigmoids": entries / evaluated * 1e-9,
    }


def copy_bandwidth(device: str) -> float:
    """GB/s, read and written, of a copy far larger than any cache."""
    call, moved = large_copy(device)
    return moved / _seconds(call, device) * 1e-9


def large_copy(device: str) -> tuple[Call, int]:
    """The copy of `copy_bandwidth`, and how many bytes it reads and writes."""
    source = torch.zeros(COPY_ENTRIES[device], dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * _FLOAT32 * source.numel()


def matrix_products(dtypes: Iterable[torch.dtype], device: str) -> dict[str, Call]:
    """Products of square matrices by the name of the dtype, e.g. ``"float32"``; of a dtype that comes twice once."""
    n = MATMUL_SIZE[device]

    def product(dtype: torch.dtype) -> Call:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return lambda: linear(a, b)

    return {str(dtype).removeprefix("torch."): product(dtype) for dtype in dict.fromkeys(dtypes)}


def matmul_gflops(seconds: float, device: str) -> float:
    """GFLOP/s of a product of `matrix_products` that takes `seconds`."""
    return 2.0 * MATMUL_SIZE[device] ** 3 / seconds * 1e-9


def quickest_product(seconds: Mapping[str, float], device: str) -> dict[str, Any]:
    """The ceiling of a row: the best rate of the products that took `seconds` by dtype.

    A CPU without bfloat16 instructions emulates them, and float32 is the ceiling that means something.
    """
    dtype = min(seconds, key=lambda dtype: seconds[dtype])
    return {"mm_gflops": matmul_gflops(seconds[dtype], device), "mm_dtype": dtype}


def in_words(ceilings: Ceilings) -> str:
    """One line."""
    products = ", ".join(f"{dtype} {gflops:.0f}" for dtype, gflops in ceilings["matmul_gflops"].items())
    rates = [point["gsigmoids"] for point in ceilings["sweep"]]
    return (
        f"copy {ceilings['copy_gbps']:.1f} GB/s; matrix product {products} GFLOP/s; "
        f"sigmoid {min(rates):.2f} to {max(rates):.2f} G/s"
    )

"""What attention promises: on the CPU beside PyTorch's ways to the same result, and on a GPU beside the best of all."""

from __future__ import annotations

from benchmarks.attention import memory
from benchmarks.bars import Bar, MemoryBar, Promise
from benchmarks.case_table import ATTENTION
from mmer_fast.bench.attention import peers
from mmer_fast.bench.attention.contestants import PLAIN, WEIGHT_GRADIENT
from mmer_fast.bench.harness import FORWARD_BACKWARD

_BOOL, _GRADIENT = ("SDPA, bool mask",), ("SDPA, mask gradient",)
# Every way in which one call of SDPA serves a padded batch.
_ANY_SDPA = ("SDPA, bool mask", "SDPA, bool mask, math", "SDPA, mask gradient", "SDPA, rank-1 log m")
_PADDED = tuple(case.name for case in ATTENTION["cpu"] if case.padded)


def _times(case: str, contestants: tuple[str, ...], at_least: float, what: str) -> Bar:
    return Bar(f"{at_least:g}x faster than {what}", case, FORWARD_BACKWARD, contestants, at_least)


CPU_BARS: tuple[Promise, ...] = (
    _times("L500-fp32", _BOOL, 2.5, "SDPA with a boolean mask"),
    _times("L500-fp32", _GRADIENT, 4.5, "SDPA with a mask that needs a gradient"),
    _times("L150-fp32", _BOOL, 2.0, "SDPA with a boolean mask"),
    _times("L150-fp32", _GRADIENT, 2.2, "SDPA with a mask that needs a gradient"),
    _times("L500-bf16", _BOOL, 3.0, "SDPA with a boolean mask"),
    _times("L500-bf16", _GRADIENT, 6.0, "SDPA with a mask that needs a gradient"),
    _times("L150-bf16", _BOOL, 2.5, "SDPA with a boolean mask"),
    _times("L150-bf16", _GRADIENT, 2.0, "SDPA with a mask that needs a gradient"),
    *(
        Bar("not slower than the best SDPA path", f"L50-{dtype}", FORWARD_BACKWARD, _ANY_SDPA, 1.0)
        for dtype in ("fp32", "bf16")
    ),
    Bar("not slower than SDPA", "L500-fp32-dense", FORWARD_BACKWARD, ("SDPA, no mask",), 1.0),
    *(
        Bar(
            "the gradient of the weights costs at most 10 %",
            case,
            FORWARD_BACKWARD,
            ("mmer_fast cpu, weights",),
            1 / 1.1,
        )
        for case in _PADDED
    ),
    MemoryBar("within 2 GiB", "memory-L16384", FORWARD_BACKWARD, memory.CONTESTANTS[0], 2 * 2**30),
)

CUDA_BARS: tuple[Promise, ...] = tuple(
    Bar(f"{at_least:g}x faster than the best peer, {task}", case.name, FORWARD_BACKWARD, names, at_least)
    for case in ATTENTION["cuda"]
    if case.padded
    for task, names, at_least in (
        (PLAIN, peers.names("cuda", PLAIN), 1.3),
        (WEIGHT_GRADIENT, peers.names("cuda", WEIGHT_GRADIENT), 3.0),
    )
)

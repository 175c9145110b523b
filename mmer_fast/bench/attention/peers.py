"""The contestants of attention: ours, and each way of PyTorch and of flash kernels to the same result."""

from __future__ import annotations

from functools import partial

from torch.nn.attention import SDPBackend

from mmer_fast.bench import harness
from mmer_fast.bench.attention.contestants import PLAIN, WEIGHT_GRADIENT, Contestant, ours
from mmer_fast.bench.attention.gpu_peers import flex, varlen
from mmer_fast.bench.attention.sdpa_peers import bool_mask, loop, mask_gradient, nested, rank_one

_FLASH, _MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
_GPU = ("cuda",)
_KERNELS = (  # of SDPA on CUDA, and how many (L, S) matrices they hold
    ("flash", _FLASH, 0),
    ("efficient", SDPBackend.EFFICIENT_ATTENTION, 0),
    ("cudnn", SDPBackend.CUDNN_ATTENTION, 0),
    ("math", _MATH, 6),
)

_CPU_PEERS = (
    Contestant("SDPA, no mask", PLAIN, partial(bool_mask, None), padded=False),
    Contestant("SDPA, bool mask", PLAIN, partial(bool_mask, None), dense=False),
    Contestant("SDPA, bool mask, math", PLAIN, partial(bool_mask, _MATH), dense=False, square=6),
    Contestant("SDPA, loop over samples", PLAIN, loop, dense=False),
    Contestant("SDPA, mask gradient", WEIGHT_GRADIENT, partial(mask_gradient, None), square=6),
    Contestant("SDPA, rank-1 log m", WEIGHT_GRADIENT, partial(rank_one, None)),
)
_GPU_PEERS = (
    *(Contestant(f"SDPA {n}", PLAIN, partial(bool_mask, k), square=s, devices=_GPU) for n, k, s in _KERNELS),
    Contestant("torch varlen_attn", PLAIN, partial(varlen, "torch", False), packed=True, devices=_GPU),
    Contestant(
        "flash_attn varlen",
        PLAIN,
        partial(varlen, "flash_attn", False),
        packed=True,
        module="flash_attn",
        package="flash-attn",
        devices=_GPU,
    ),
    Contestant("FlexAttention", PLAIN, partial(flex, True), compiled=True, devices=_GPU),
    *(
        Contestant(
            f"SDPA {n}, mask gradient", WEIGHT_GRADIENT, partial(mask_gradient, k), square=max(s, 2), devices=_GPU
        )
        for n, k, s in _KERNELS
    ),
    Contestant("SDPA flash, rank-1 log m", WEIGHT_GRADIENT, partial(rank_one, _FLASH), devices=_GPU),
    Contestant(
        "torch varlen_attn, rank-1 log m", WEIGHT_GRADIENT, partial(varlen, "torch", True), packed=True, devices=_GPU
    ),
    Contestant(
        "flash_attn varlen, rank-1 log m",
        WEIGHT_GRADIENT,
        partial(varlen, "flash_attn", True),
        packed=True,
        module="flash_attn",
        package="flash-attn",
        devices=_GPU,
    ),
    Contestant("FlexAttention, log m", WEIGHT_GRADIENT, partial(flex, True), compiled=True, devices=_GPU),
)
CONTESTANTS = (
    *ours("cpu", "cpu"),
    *ours("cuda", "cuda"),
    *ours("triton", "cuda"),
    *_CPU_PEERS,
    Contestant("SDPA, nested tensors", PLAIN, nested, packed=True, dense=False, devices=("cpu", "cuda")),
    *_GPU_PEERS,
)


def select(device: str, names: list[str] | None = None) -> list[Contestant]:
    """The contestants of a device type; with `names`, those whose name contains one of them, and ours.

    Raises:
        ValueError: a name that fits no contestant.
    """
    pool = [contestant for contestant in CONTESTANTS if device in contestant.devices]
    mine = {c.name for c in pool if c.backend is not None}
    chosen = harness.select([c.name for c in pool], mine, set(), names)
    return [contestant for contestant in pool if contestant.name in chosen]


def names(device: str, task: str) -> tuple[str, ...]:
    """Who is not ours and solves `task`."""
    pool = select(device)
    return tuple(c.name for c in pool if c.backend is None and c.task == task)

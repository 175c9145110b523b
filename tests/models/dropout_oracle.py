"""The draws of dropout, transcribed from kernels/common/dropout_args.h, and its fused forms in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.ops.attention_checks import drawn_seed
from mmer_fast.ops.philox import philox4x32

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of an output or gradient of order 1, relative to the largest entry.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def next_seed(p: float) -> int:
    """The seed that the next call draws from torch's generator, which stays as it is."""
    with torch.random.fork_rng(devices=()):
        seed = drawn_seed(p, torch.device("cpu"))
    return 0 if seed is None else int(seed)


def mask(shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    """0 or 1/(1 - q), float64."""
    count = torch.Size(shape).numel()
    groups = torch.arange((count + 7) // 8)
    none = torch.zeros_like(groups)
    words = torch.stack(philox4x32((groups, none, none, none), (seed & 0xFFFFFFFF, seed >> 32)), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[:count]
    dropped = round(p * 65536)
    return (halves >= dropped).double().mul(65536 / (65536 - dropped)).reshape(shape)


def layer_norm(
    x: Tensor, x_bias: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, mask: Tensor
) -> Tensor:
    branch = x if x_bias is None else x + x_bias
    return F.layer_norm(residual + branch * mask, weight.shape, weight, bias, 1e-5)


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """As near as the dtype allows; of whatever dtype both are."""
    atol = TOLERANCES[dtype] * max(1.0, float(expected.detach().abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=atol)

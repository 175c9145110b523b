"""The one table of tolerances: absolute error of a weight (they lie in [0, 1]) and relative error of gradients."""

from __future__ import annotations

import torch

# Of the operator against the float64 oracle on the same (already rounded) scores.
WEIGHT = {
    torch.float64: 1e-11,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,  # half an ulp near 1 is 2^-9
    torch.float16: 2**-11,
}
# |g - g_ref| <= GRADIENT * max |g_ref| of the row.
GRADIENT = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-9,
}

# Attention, against the float64 reference on the same (already rounded) inputs; relative to the largest entry or 1.
# Half types round p, and on the GPU ds, to their own precision, as PyTorch's kernels do.
ATTENTION = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1.5e-3,
}
ATTENTION_LSE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}
ATTENTION_GRADIENT = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}

"""The modules in float32 on every kernel that this machine has, against float64 on the reference."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformer_twins import LENGTHS, SCATTERED, B, H, T, batch, stacks

import mmer_fast as mf
from mmer_fast import nn
from mmer_fast.ops import _backends


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("triton", marks=pytest.mark.gpu)]
)
def kernel(request):
    """Name and device of a backend."""
    name = request.param
    device = "cuda" if name == "cuda" or (name == "triton" and torch.cuda.is_available()) else "cpu"
    reason = _backends.unavailable_reason(name, device)
    if reason is None and device == "cuda" and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    with np.errstate(all="ignore"):  # Triton's interpreter computes with NumPy
        yield name, device


@pytest.mark.parametrize("options", [{"lengths": LENGTHS}, {"src_key_padding_mask": SCATTERED, "is_causal": True}, {}])
def test_encoder(kernel, options):
    name, device = kernel
    wide, _ = stacks(batch_first=True)
    narrow = copy.deepcopy(wide).to(device, torch.float32)
    x, m = batch(), torch.rand(B, H, T, dtype=torch.float64)
    results = []
    for backend, module in (("reference", wide), (name, narrow)):
        like = next(module.parameters())
        weights = m.to(like).requires_grad_()
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) and module is narrow else value
                 for key, value in options.items()}  # fmt: skip
        with mf.use_backend(backend):
            out = module(x.to(like), key_weights=weights, **moved)
            grads = torch.autograd.grad(out.square().sum(), [weights, *module.parameters()])
        results.append([y.detach().cpu().double() for y in (out, *grads)])
    for expected, got in zip(*results, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_weights_of_attention(kernel):
    """They are made of what the kernel says of its sums."""
    name, device = kernel
    wide = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    narrow = copy.deepcopy(wide).to(device, torch.float32)
    x, m = batch(), torch.rand(B, T, dtype=torch.float64)
    options = {"lengths": LENGTHS, "query_lengths": LENGTHS}
    expected = wide(x, x, x, key_weights=m, **options)
    given, options = x.to(device, torch.float32), {key: value.to(device) for key, value in options.items()}
    with mf.use_backend(name):
        got = narrow(given, given, given, key_weights=m.to(given), **options)
    for a, b in zip(got, expected, strict=True):
        assert (a.cpu().double() - b).abs().max() <= 1e-5

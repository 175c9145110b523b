"""Attention against the float64 reference on every backend: sizes, options, dtypes; outputs and all gradients."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from attention_cases import DTYPES, check, close, qkv, weights

import mmer_fast as mf
from mmer_fast import _extension

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("width", [1, 8, 40, 64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 49), (48, 48), (49, 193), (97, 64), (129, 1134)])
def test_sizes(backend, device, interpreted, dtype, queries, keys, width):
    if interpreted and (queries > 48 or width not in (8, 64)):
        pytest.skip("too slow in the interpreter")
    check(backend, *qkv(dtype, 2, 2, 2, queries, keys, width, device))


@dtypes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "sample", "head"])
@pytest.mark.parametrize("padding", ["none", "lengths", "mask"])
def test_options(backend, device, interpreted, dtype, padding, kind, causal):
    if interpreted and dtype != torch.float32:
        pytest.skip("too slow in the interpreter")
    batch, heads, queries, keys = (3, 2, 20, 40) if interpreted else (3, 4, 60, 210)
    options: dict = {"causal": causal, "scale": 0.3}
    if padding == "lengths":
        options["lengths"] = torch.tensor([keys, 0, keys // 3], device=device)
        options["query_lengths"] = torch.tensor([queries, 9, 0], device=device)
    elif padding == "mask":
        mask = torch.rand(batch, keys, device=device) < 0.4
        mask[2] = False
        options["mask"] = mask
    check(backend, *qkv(dtype, batch, heads, heads // 2, queries, keys, 24, device),
          weights(kind, batch, heads, keys, device), **options)  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", ["full", "batch", "heads", "queries", "keys", "expanded"])
def test_bias_of_every_shape(backend, device, interpreted, shape, causal):
    batch, heads, queries, keys = (2, 2, 9, 20) if interpreted else (2, 4, 70, 230)
    sizes = {
        "full": (batch, heads, queries, keys),
        "batch": (batch, 1, queries, keys),
        "heads": (1, heads, queries, keys),
        "queries": (1, 1, queries, keys),
        "keys": (batch, 1, 1, keys),
        "expanded": (1, 1, 1, keys),
    }[shape]
    bias = torch.randn(sizes, device=device)
    bias[..., 3] = -math.inf
    if shape == "expanded":
        bias = bias.expand(batch, heads, 1, keys)
    m = weights("sample", batch, heads, keys, device)
    check(backend, *qkv(torch.float32, batch, heads, 1, queries, keys, 16, device), m, bias, causal=causal,
          lengths=torch.tensor([keys - 2, 15], device=device), dropout_p=0.2, seed=5)  # fmt: skip


@dtypes
@pytest.mark.parametrize("kind", ["none", "head"])
def test_dropout_drops_what_the_reference_drops(backend, device, interpreted, dtype, kind):
    queries, keys = (9, 37) if interpreted else (60, 233)
    check(backend, *qkv(dtype, 2, 4, 2, queries, keys, 32, device), weights(kind, 2, 4, keys, device),
          dropout_p=0.37, seed=2**40 + 17, lengths=torch.tensor([keys, keys // 2], device=device))  # fmt: skip


@pytest.mark.parametrize("kind", ["sample", "head"])
def test_the_exact_gradient_of_weights_that_are_zero(backend, device, interpreted, kind):
    batch, heads, queries, keys = 2, 2, 12, 30 if interpreted else 250
    q, k, v = qkv(torch.float32, batch, heads, heads, queries, keys, 16, device)
    m = weights(kind, batch, heads, keys, device)
    lengths = torch.tensor([keys, 17], device=device)
    check(backend, q, k, v, m, lengths=lengths, exact_zero_weight_grad=True)

    def gradient(exact: bool) -> torch.Tensor:
        leaf = m.clone().requires_grad_()
        out = mf.masked_attention(q, k, v, leaf, exact_zero_weight_grad=exact, lengths=lengths, backend=backend)
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    default, exact = gradient(False), gradient(True)
    zero = m == 0
    assert (default[zero] == 0).all()
    assert (exact[zero] != 0).any()
    close(default[~zero], exact[~zero].double(), 1e-5)


def test_weights_near_zero_have_finite_gradients(backend, device):
    q, k, v = qkv(torch.float32, 1, 1, 1, 4, 6, 8, device)
    m = torch.tensor([[1.0, 1e-30, 1e-42, 0.5, 0.0, 1.0]], device=device, requires_grad=True)
    mf.masked_attention(q, k, v, m, backend=backend).square().sum().backward()
    assert m.grad.isfinite().all()


def test_large_scores(backend, device, interpreted):
    queries, keys = (5, 20) if interpreted else (50, 300)
    q, k, v = qkv(torch.float32, 1, 2, 2, queries, keys, 32, device)
    check(backend, 10 * q, 10 * k, v, rounding=100.0)
    check(backend, q, k, v, None, torch.full((1, 1, 1, keys), -1e4, device=device), rounding=1000.0)
    assert mf.masked_attention(1e4 * q, 1e4 * k, v, backend=backend).isfinite().all()


def test_weights_of_zero_and_one_are_a_boolean_mask(backend, device):
    q, k, v = qkv(torch.float32, 2, 2, 2, 9, 12, 8, device)
    mask = torch.rand(2, 12, device=device) < 0.5
    mask[:, 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    close(mf.masked_attention(q, k, v, mask.float(), backend=backend), expected.double(), 1e-5)
    close(mf.masked_attention(q, k, v, mask=mask, backend=backend), expected.double(), 1e-5)


@pytest.mark.skipif(_extension.unavailable_reason() is not None, reason="needs the compiled library")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_cpu_variant(isa):
    """The tests of options and of biases, in a process of its own."""
    choice = "cpu and (options or bias or dropout)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", choice]
    environment = {**os.environ, "MMER_FAST_CPU_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]

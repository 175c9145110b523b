"""The CPU kernel of attention against the float64 reference, over awkward sizes."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mmer_fast import _extension
from mmer_fast.ops.attention_cpu import attention_backward, attention_forward
from mmer_fast.ops.attention_reference import attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LSE_TOLERANCE = 5e-6
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
pytestmark = pytest.mark.skipif(_extension.unavailable_reason() is not None, reason="needs the compiled library")


def tensors(dtype: torch.dtype, batch: int, heads: int, key_heads: int, queries: int, keys: int, width: int):
    shapes = [(batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def check(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None, **options: object) -> Tensor:
    """Runs the kernel and the reference on the same numbers; returns the kernel's output.

    Options are those of the reference; `rounding`: how many times more than usual scores this large are rounded.
    """
    names = ("lengths", "query_lengths", "mask", "bias", "causal")
    scale, rounding = options.pop("scale", q.shape[-1] ** -0.5), options.pop("rounding", 1.0)
    lengths, query_lengths, mask, bias, causal = (options.pop(name, None) for name in names)
    assert not options
    full = None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out, lse = attention_forward(q, k, v, m, lengths, query_lengths, mask, full, bool(causal), scale)
    expected, expected_lse = attention(
        q.double(), k.double(), v.double(), m, lengths=lengths, query_lengths=query_lengths, mask=mask, bias=bias,
        causal=bool(causal), scale=scale,
    )  # fmt: skip
    size = rounding * (max(1.0, float(expected.abs().max())) if expected.numel() else 1.0)
    assert out.dtype == q.dtype
    assert (out.double() - expected).abs().nan_to_num(math.inf).le(TOLERANCE[q.dtype] * size).all()
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    if rounding == 1.0:
        check_gradients(q, k, v, m, lengths, query_lengths, mask, bias, causal, scale, out, lse)
    difference = (lse.double() - expected_lse).masked_fill(empty, 0.0).abs()
    assert difference.le(LSE_TOLERANCE * (1 + expected_lse.masked_fill(empty, 0.0).abs())).all()
    return out


def check_gradients(q, k, v, m, lengths, query_lengths, mask, bias, causal, scale, out, lse) -> None:
    grad = torch.randn(q.shape).to(q.dtype)
    full = None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    got = attention_backward(grad, out, lse, q, k, v, m, lengths, query_lengths, mask, full, bool(causal), scale)
    per_head = None if m is None else (m[:, None].expand(-1, q.shape[1], -1) if m.dim() == 2 else m).clone()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    leaves += [] if per_head is None else [per_head.double().requires_grad_()]
    expected_out, _ = attention(
        *leaves, lengths=lengths, query_lengths=query_lengths, mask=mask, bias=bias, causal=bool(causal), scale=scale
    )
    expected = torch.autograd.grad(expected_out, leaves, grad.double())
    for g, e in zip(got, expected, strict=False):
        size = max(1.0, float(e.abs().max())) if e.numel() else 1.0
        assert g.shape == e.shape
        assert (g.double() - e).abs().nan_to_num(math.inf).le(GRADIENT_TOLERANCE[q.dtype] * size).all()


@dtypes
@pytest.mark.parametrize("width", [1, 8, 40, 64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 49), (48, 48), (49, 193), (97, 64), (200, 400)])
def test_sizes(dtype, queries, keys, width):
    check(*tensors(dtype, 2, 2, 2, queries, keys, width))


@dtypes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weights", ["none", "sample", "head"])
@pytest.mark.parametrize("padding", ["none", "lengths", "mask"])
def test_options(dtype, padding, weights, causal):
    batch, heads, queries, keys = 3, 4, 60, 210
    q, k, v = tensors(dtype, batch, heads, 2, queries, keys, 24)
    options: dict = {"causal": causal, "scale": 0.3, "bias": torch.randn(1, heads, queries, keys)}
    if padding == "lengths":
        options["lengths"] = torch.tensor([keys, 0, 33])
        options["query_lengths"] = torch.tensor([queries, 9, 0])
    elif padding == "mask":
        options["mask"] = torch.rand(batch, keys) < 0.4
        options["mask"][2] = False
    m = None
    if weights != "none":
        m = torch.rand((batch, keys) if weights == "sample" else (batch, heads, keys))
        m = m.masked_fill(m < 0.2, 0.0)
    check(q, k, v, m, **options)


def test_padding_may_hold_nan():
    q, k, v = tensors(torch.float32, 2, 2, 2, 20, 30, 16)
    m = torch.rand(2, 30)
    m[0, 3] = 0
    lengths, query_lengths = torch.tensor([30, 11]), torch.tensor([20, 5])
    expected = check(q, k, v, m, lengths=lengths, query_lengths=query_lengths)
    for x in (k, v):
        x[0, :, 3] = math.nan
        x[1, :, 11:] = math.inf
    q[1, :, 5:] = math.nan
    m[1, 11:] = math.nan
    out, _ = attention_forward(q, k, v, m, lengths, query_lengths, None, None, False, 0.25)
    assert torch.equal(out, expected)


def test_a_nan_that_counts_is_seen():
    for which in range(3):
        x = tensors(torch.float32, 1, 1, 1, 3, 5, 8)
        x[which][0, 0, 2, 1] = math.nan
        out, _ = attention_forward(*x, None, None, None, None, None, False, 1.0)
        assert out[0, 0, 2].isnan().any()


def test_large_scores():
    q, k, v = tensors(torch.float32, 1, 2, 2, 50, 300, 32)
    check(10 * q, 10 * k, v, rounding=100.0)
    check(q, k, v, bias=torch.full((1, 1, 1, 300), -1e4), rounding=1000.0)
    assert check(1e4 * q, 1e4 * k, v, rounding=1e6).isfinite().all()


def test_strided_and_offset_views():
    base = torch.randn(3, 70, 3, 2, 17)
    q, k, v = (base[:, :, i, :, 1:].transpose(1, 2) for i in range(3))
    check(q, k, v)
    check(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)


def test_few_heads_are_cut_into_chunks_of_queries():
    q, k, v = tensors(torch.float32, 1, 1, 1, 500, 260, 16)
    check(q, k, v, causal=True, query_lengths=torch.tensor([390]))


def test_runs_are_bitwise_equal_whatever_the_threads():
    q, k, v = tensors(torch.float32, 2, 2, 2, 300, 300, 32)
    arguments = (q, k, v, None, None, None, None, None, False, 0.2)
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out, lse = attention_forward(*arguments)
        runs.append((out, lse, *attention_backward(q, out, lse, *arguments)))
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_no_queries(shape):
    check(torch.zeros(shape), torch.zeros(shape[0], 2, 5, 4), torch.zeros(shape[0], 2, 5, 4))


def test_no_keys():
    check(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 0, 4), torch.zeros(2, 2, 0, 4))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_cpu_variant(isa):
    """The tests of options, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "options or nan"]
    environment = {**os.environ, "MMER_FAST_CPU_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("case", ["dtype", "width", "heads", "weights", "mask", "lengths", "bias", "float64"])
def test_bad_arguments(case):
    q, k, v = tensors(torch.float32, 2, 4, 2, 5, 6, 8)
    options: dict = {}
    if case == "dtype":
        k = k.half()
    elif case == "width":
        k = k[..., :7]
    elif case == "heads":
        k, v = (torch.randn(2, 3, 6, 8) for _ in range(2))
    elif case == "weights":
        options["m"] = torch.rand(2, 5)
    elif case == "mask":
        options["mask"] = torch.ones(2, 5, dtype=torch.bool)
    elif case == "lengths":
        options["lengths"] = torch.ones(3, dtype=torch.int64)
    elif case == "bias":
        options["bias"] = torch.zeros(1, 1, 5, 6)
    else:
        q, k, v = q.double(), k.double(), v.double()
    message = {"dtype": "k must have the dtype", "width": "k must have the B and D", "heads": "must divide",
               "weights": "key_weights must have shape", "mask": "mask must be bool", "lengths": "lengths must have",
               "bias": "bias must have shape", "float64": "q must be float32"}[case]  # fmt: skip
    optional = [options.get(name) for name in ("m", "lengths", "query_lengths", "mask", "bias")]
    with pytest.raises(RuntimeError, match=message):
        attention_forward(q, k, v, *optional, False, 1.0)

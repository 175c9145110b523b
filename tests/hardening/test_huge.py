"""Offsets and sizes beyond 2^31 elements.

Views into memory that is reserved but hardly touched reach far without costing anything, so inputs are tested always.
Outputs are written from end to end: they are for `make test-slow`, on a machine with the memory free.
"""

from __future__ import annotations

import fcntl
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast import ops
from mmer_fast.ops import _backends
from mmer_fast.ops.dropout_add_layer_norm import redraw
from mmer_fast.ops.philox import philox4x32

ROOT = Path(__file__).resolve().parents[2]
FAR = 2**31 + 8  # elements
BACKENDS = ["reference", "cpu", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]


def reserved(elements: int, device: str) -> Tensor:
    """(elements,) bfloat16 zeros, of which only what is written becomes memory; on a GPU all of it."""
    if device == "cuda":
        return torch.zeros(elements, dtype=torch.bfloat16, device=device)
    return torch.from_numpy(np.zeros(elements, np.int16)).view(torch.bfloat16)


@pytest.fixture
def needs() -> Iterator[Callable[[float], None]]:
    """Skips where so many gigabytes are not free. Tests that ask run one at a time, whatever process they are in."""
    with open(Path(tempfile.gettempdir()) / "mmer_fast_huge.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _skip_without


def _skip_without(gigabytes: float) -> None:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(found[1]) / 1e6 if found else 0.0
    if free < gigabytes + 2:
        pytest.skip(f"needs {gigabytes:g} GB of memory and 2 to spare, {free:.1f} are free")


def device_of(backend: str) -> str:
    """Where a backend is tested here: Triton in its interpreter on the CPU, whose strides are the same."""
    if backend == "cuda" and (reason := _backends.unavailable_reason(backend, backend)):
        pytest.skip(f"backend {backend}: {reason}")
    return "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"


def far_apart(x: Tensor, dim: int) -> Tensor:
    """`x` (bfloat16) in memory in which neighbours along `dim` are more than 2^31 elements apart."""
    strides = list(torch.empty(x.shape, device="meta").stride())
    strides[dim] = FAR
    view = reserved(FAR * (x.shape[dim] - 1) + x.numel(), x.device.type).as_strided(x.shape, strides)
    return view.copy_(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_topk_of_rows_far_apart(backend: str) -> None:
    device = device_of(backend)
    near = torch.randn(2, 40, device=device).bfloat16()
    far = far_apart(near, 0)
    near.requires_grad_(), far.requires_grad_()
    results = [mf.soft_topk(x, 3, backend=backend) for x in (near, far)]
    assert torch.equal(*results)
    upstream = torch.randn(2, 40, device=device).bfloat16()
    grads = [torch.autograd.grad(w, x, upstream)[0] for w, x in zip(results, (near, far), strict=True)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["samples", "heads", "tokens"])
def test_attention_to_arrays_far_apart(backend: str, dim: int) -> None:
    device = device_of(backend)
    near = [torch.randn(2, 2, 2, 4, device=device).bfloat16() for _ in range(3)]
    far = [far_apart(x, dim).requires_grad_() for x in near]
    cotangent = torch.randn(near[0].shape, device=device).bfloat16()
    near = [x.requires_grad_() for x in near]
    outputs = [mf.masked_attention(*three, backend=backend) for three in (near, far)]
    assert torch.equal(*outputs)
    grads = [torch.autograd.grad(out, x, cotangent) for out, x in zip(outputs, (near, far), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_perturbation_far_into_memory(backend: str) -> None:
    device = device_of(backend)
    memory, numbers = reserved(FAR + 64, device), torch.arange(65, device=device).bfloat16()
    w, g = memory[FAR:].copy_(numbers[:64]), torch.ones(64, dtype=torch.bfloat16, device=device)
    stash = torch.empty_like(w)
    ops.perturb_([w], [g], [stash], 8.0, backend=backend)
    assert torch.equal(w, numbers[1:])
    ops.restore_([w], [stash], backend=backend)
    assert torch.equal(w, numbers[:64])


def one(*shape: int) -> Tensor:
    """As many times the same number, in the memory of one."""
    return torch.zeros(1).expand(shape)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mf.soft_topk(one(1, 2**32), 1, backend="cpu"),
        lambda: mf.soft_topk(one(1, 2**30), 1, backend="triton"),
        lambda: mf.masked_attention(one(1, 1, 2**31, 1), one(1, 1, 1, 1), one(1, 1, 1, 1), backend="cpu"),
        lambda: mf.masked_attention(one(1, 1, 1, 1), one(1, 1, 2**31, 1), one(1, 1, 2**31, 1), backend="triton"),
    ],
    ids=["row", "row on a GPU", "queries", "keys"],
)
def test_what_is_too_long_is_refused_with_the_limit(call: Callable[[], object]) -> None:
    with pytest.raises(mf.BackendUnavailable, match=r"serves (rows|samples) of up to \d+ (entries|tokens), not \d+"):
        call()


def test_packed_batches_of_more_tokens_than_int32_counts() -> None:
    tokens, ends = one(2**31, 1, 1), torch.tensor([0, 2**31])
    with pytest.raises(ValueError, match=r"q must have at most 2147483647 tokens"):
        mf.packed_attention(tokens, tokens, tokens, ends)
    with pytest.raises(ValueError, match=r"lengths must sum to at most 2147483647"):
        mf.packed_layout(torch.full((3,), 2**30))


def test_the_operators_of_the_dispatcher_refuse_too() -> None:
    """Whoever goes past the public functions, as a compiled graph does."""
    with pytest.raises(RuntimeError, match="a row may have at most 4294967295 entries"):
        torch.ops.mmer_fast.soft_topk_forward(one(1, 2**32), None, 1.0, None, 1.0, None, None, True, 0)
    q, nothing = one(1, 1, 2**31, 1), (None,) * 7
    with pytest.raises(RuntimeError, match="a sample may have at most 2147482624 tokens"):
        torch.ops.mmer_fast.attention_forward(q, q, q, *nothing, 2**31, 2**31, False, 1.0, 0.0, None, False)


def test_sizes_and_strides_have_64_bits() -> None:
    """What the kernels are given: narrower integers hold no size, no stride and no count."""
    narrow = r"\b(?:u?int(?:8|16|32)_t|int|unsigned|short|long) +\*?(\w+)"
    allowed = {"cu_seqlens_q", "cu_seqlens", "dropped_of_65536"}
    for header in sorted((ROOT / "kernels" / "common").glob("*_args.h")):
        text = re.sub(r"//.*|enum class \w+ : int|const (?:uint8_t|int32_t) ?\*", "", header.read_text())
        found = set(re.findall(narrow, text)) - allowed
        assert not found, f"{header.name}: {found}"


def test_what_sources_call_a_size_or_a_stride_has_64_bits() -> None:
    """Strides and counts over a batch everywhere. CUDA counts in int within a row or a tile, never so long."""
    everywhere = "strides?|elements|numel|tokens|rows"
    on_the_host = f"{everywhere}|cols|columns|length|width|batch|heads|queries|keys"
    for folder, names in (("cuda", everywhere), *((x, on_the_host) for x in ("common", "cpu", "csrc"))):
        narrow = rf"\b(?:u?int(?:8|16|32)_t|int|unsigned|short) +(?:\w+_)?(?:{names})_? *[=;,)]"
        sources = [x for x in (ROOT / ("" if folder == "csrc" else "kernels") / folder).iterdir() if x.is_file()]
        assert sources
        for source in sources:
            found = re.findall(narrow, re.sub(r"//.*", "", source.read_text()))
            assert not found, f"{source.name}: {found}"


@pytest.mark.slow
def test_soft_topk_of_more_than_2_to_the_31_weights(needs: Callable[[float], None]) -> None:
    needs(9)
    rows, cols = 2**15 + 1, 2**16
    row = torch.randn(cols).bfloat16()
    scores = row.expand(rows, cols)
    expected, threshold, _ = torch.ops.mmer_fast.soft_topk_forward(
        row[None], None, 9000.0, None, 0.05, None, None, True, 0
    )
    weights, thresholds, _ = torch.ops.mmer_fast.soft_topk_forward(
        scores, None, 9000.0, None, 0.05, None, None, True, 0
    )
    assert weights.numel() > 2**31
    assert bool((thresholds == threshold).all())
    for i in (0, 1, rows // 2, rows - 2, rows - 1):
        assert torch.equal(weights[i], expected[0])
    del weights
    backward = torch.ops.mmer_fast.soft_topk_backward
    options = (None, None, 0.05, None, None, True)
    upstream = torch.randn(cols).bfloat16()
    expected, *_ = backward(upstream[None], row[None], threshold, *options)
    gradient, *_ = backward(upstream.expand(rows, cols), scores, thresholds, *options)
    for i in (0, rows // 2, rows - 1):
        assert torch.equal(gradient[i], expected[0])


@pytest.mark.slow
def test_attention_with_more_than_2_to_the_31_outputs(needs: Callable[[float], None]) -> None:
    needs(5)
    queries = 2**25 + 1
    q = torch.randn(1, 1, 1, 64).bfloat16()
    k, v = (torch.randn(1, 1, 3, 64).bfloat16() for _ in range(2))
    expected, out = (mf.masked_attention(x, k, v) for x in (q, q.expand(1, 1, queries, 64)))
    assert isinstance(out, Tensor)
    assert isinstance(expected, Tensor)
    assert out.numel() > 2**31
    assert not any(torch.equal(expected[0, 0, 0], one) for one in v[0, 0])  # a mean of several
    for i in (0, queries // 2, queries - 1):
        assert torch.equal(out[0, 0, i], expected[0, 0, 0])


@pytest.mark.slow
def test_attention_with_more_than_2_to_the_31_gradients(needs: Callable[[float], None]) -> None:
    needs(18)
    queries = 2**25 + 1
    row, cotangent = (torch.randn(1, 1, 1, 64).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, 1, 3, 64).bfloat16() for _ in range(2))
    expected, found = (
        torch.autograd.grad(mf.masked_attention(q, k, v), q, cotangent.expand(q.shape))[0]
        for q in (row.clone().requires_grad_(), row.expand(1, 1, queries, 64).detach().requires_grad_())
    )
    assert found.numel() > 2**31
    assert bool(expected.any())
    for i in (0, queries // 2, queries - 1):
        assert torch.equal(found[0, 0, i], expected[0, 0, 0])


@pytest.mark.slow
def test_the_norm_of_more_than_2_to_the_31_gradients(needs: Callable[[float], None]) -> None:
    needs(5)
    g = torch.full((FAR,), 2.0, dtype=torch.bfloat16)
    g[-1] = 2.0**17
    assert float(ops.grad_norm([g])) == pytest.approx((4.0 * (FAR - 1) + 2.0**34) ** 0.5, rel=1e-6)


@pytest.mark.slow
def test_perturbation_of_more_than_2_to_the_31_weights(needs: Callable[[float], None]) -> None:
    needs(13)
    w, g, stash = (torch.full((FAR,), value, dtype=torch.bfloat16) for value in (1.0, 0.0, 0.0))
    w[-8:], g[-8:] = torch.arange(8), 1.0
    ops.perturb_([w], [g], [stash], 8.0**0.5)
    assert torch.equal(w[-8:], torch.arange(1, 9).bfloat16())
    assert torch.equal(stash[-8:], torch.arange(8).bfloat16())
    assert float(w[0]) == float(stash[2**31 - 1]) == 1.0
    ops.restore_([w], [stash])
    assert torch.equal(w[-8:], torch.arange(8).bfloat16())


@pytest.mark.slow
def test_dropout_of_more_than_2_to_the_31_elements(needs: Callable[[float], None]) -> None:
    needs(9)
    seed = torch.tensor([77])
    out = redraw(torch.ones(FAR, dtype=torch.bfloat16), 0.5, seed)
    group = torch.tensor([FAR // 8 - 1])
    words = philox4x32((group, *(torch.zeros(1, dtype=torch.int64),) * 3), (77, 0))
    halves = torch.stack([part for word in words for part in (word & 0xFFFF, word >> 16)]).flatten()
    assert torch.equal(out[-8:] > 0, halves >= 2**15)

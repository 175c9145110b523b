"""The CUDA attention kernels without a GPU: their sources run on the host, thread by thread (cuda_emulation).

Every array ends at a page without access, results and shared memory are NaN at first, and each kernel runs twice with
its warps in another order and its copies landing at other times: the results must be the same bits, and the float64
reference's to within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import launch
from cuda_emulation.cases import LSE_TOLERANCE, TOLERANCES, Case, Machine, check, near, qkv, run, same, weights
from torch import Tensor

from mmer_fast.ops.attention_reference import attention
from mmer_fast.ops.philox import attention_keep_mask

NAN, INF = math.nan, math.inf
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]

pytestmark = pytest.mark.skipif(launch.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Path:
    return launch.build(pytestconfig.cache.mkdir("cuda_emulation"))


@pytest.fixture
def machine(library: Path) -> Machine:
    return Machine(library)


SIZES = [
    (1, 1, 1, 1, 1, 8),
    (2, 2, 1, 7, 49, 40),
    (1, 2, 2, 65, 129, 64),
    (1, 1, 1, 129, 65, 128),
    (1, 2, 2, 49, 7, 33),
    (1, 1, 1, 17, 40, 72),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(machine: Machine, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    check(machine, qkv(dtype, *size))


SEVERAL = (2, 4, 2, 65, 70, 24)  # batch, heads, key heads, queries, keys, width: tiles of all kinds


def _several(**options: Any) -> Callable[[torch.dtype], Case]:
    return lambda dtype: replace(qkv(dtype, *SEVERAL), **options)


def _everything(dtype: torch.dtype, **options: Any) -> Case:
    batch, heads, _, queries, keys, _ = SEVERAL
    options = {"lengths": torch.tensor([70, 33]), "query_lengths": torch.tensor([50, 65]), **options}
    options |= {"key_weights": weights(batch, heads, keys), "bias": torch.randn(batch, heads, queries, keys)}
    return replace(qkv(dtype, *SEVERAL), causal=True, dropout_p=0.3, **options)


OPTIONS: dict[str, Callable[[torch.dtype], Case]] = {
    "causal": _several(causal=True),
    "dropout": _several(dropout_p=0.4),
    "without grad_lse": _several(grad_lse=False),
    "lengths": _several(lengths=torch.tensor([3, 64]), query_lengths=torch.tensor([64, 2])),
    "lengths beyond the array or 0": _several(lengths=torch.tensor([1000, 0]), query_lengths=torch.tensor([0, 1000])),
    "shared weights": lambda dtype: replace(qkv(dtype, *SEVERAL), key_weights=weights(2, 70)),
    "weights per head": lambda dtype: replace(qkv(dtype, *SEVERAL), key_weights=weights(2, 4, 70)),
    "mask": lambda dtype: replace(qkv(dtype, *SEVERAL), mask=torch.rand(2, 70) > 0.5),
    "everything": lambda dtype: _everything(dtype, mask=torch.rand(2, 70) > 0.2),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_options(machine: Machine, dtype: torch.dtype, option: str) -> None:
    check(machine, OPTIONS[option](dtype))


@pytest.mark.parametrize("shape", [(b, h, i, 33) for b in (1, 2) for h in (1, 4) for i in (1, 65)], ids=str)
def test_bias_shapes(machine: Machine, shape: tuple[int, ...]) -> None:
    case = replace(qkv(BF16, 2, 4, 2, 65, 33, 16), bias=torch.randn(shape), key_weights=weights(2, 33), dropout_p=0.2)
    check(machine, replace(case, lengths=torch.tensor([33, 20])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_strides_and_infinity(machine: Machine, dtype: torch.dtype) -> None:
    bias = torch.randn(40, 2, 65, 3).permute(3, 1, 2, 0)[1:]
    bias[0, 0, :, 5] = bias[1, 1, 7] = -INF  # a key, and all keys of a query
    got = check(machine, replace(qkv(dtype, 2, 2, 2, 65, 40, 16), bias=bias))
    assert not got.grads["bias"][bias == -INF].any()


def packed_case(dtype: torch.dtype, **options: Any) -> Case:
    lengths, query_lengths = torch.tensor([0, 65, 7, 0, 1, 64]), torch.tensor([3, 66, 9, 0, 64, 0])
    case = qkv(dtype, 6, 2, 1, 66, 65, 16)
    return replace(case, lengths=lengths, query_lengths=query_lengths, packed=True, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed(machine: Machine, dtype: torch.dtype) -> None:
    check(machine, packed_case(dtype))
    m = weights(6, 65) if dtype == F32 else weights(6, 2, 65)
    check(machine, packed_case(dtype, causal=True, dropout_p=0.3, key_weights=m, bias=torch.randn(1, 2, 66, 65)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_and_padded_agree_bit_for_bit(machine: Machine, dtype: torch.dtype) -> None:
    case = packed_case(dtype, causal=True, dropout_p=0.3, key_weights=weights(6, 2, 65))
    grad, grad_lse = torch.randn(case.q.shape).to(dtype), torch.randn(case.q.shape[:-1])
    packed, padded = run(machine, case, grad, grad_lse), run(machine, replace(case, packed=False), grad, grad_lse)
    assert same(packed.out, case.pack_queries(padded.out))
    assert same(packed.lse, case.pack_queries(padded.lse))
    for name, pack in {"q": case.pack_queries, **dict.fromkeys(("k", "v", "weights"), case.pack_keys)}.items():
        assert same(packed.grads[name], pack(padded.grads[name])), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(machine: Machine, dtype: torch.dtype) -> None:
    """Tokens before heads, rows at odd addresses, an offset, and one array for all samples (a stride of 0)."""
    q = torch.randn(2, 65, 4, 40).to(dtype).transpose(1, 2)
    k = torch.randn(2, 2, 70, 43).to(dtype)[..., 3:]
    v = torch.randn(1, 2, 70, 40).to(dtype).expand(2, -1, -1, -1)
    mask = (torch.rand(70, 2) > 0.3).t().contiguous()
    check(machine, Case(q, k, v, key_weights=weights(70, 2).t(), mask=mask, query_lengths=torch.tensor([65, 40])))


def poison(case: Case) -> tuple[Case, Tensor]:
    """NaN in all that must not count, and an upstream gradient that has it too where the queries are padding."""
    q, k, v = case.q.clone(), case.k.clone(), case.v.clone()
    m, bias = case.key_weights.clone(), case.bias.clone()
    grad = torch.randn(q.shape).to(q.dtype)
    for b in range(len(q)):
        length, queries = int(case.lengths[b]), int(case.query_lengths[b])
        k[b, :, length:] = v[b, :, length:] = m[b, :, length:] = bias[b, :, :, length:] = NAN
        q[b, :, queries:] = grad[b, :, queries:] = bias[b, :, queries:] = NAN
        out = ~case.mask[b] | (m[b] == 0).all(0)
        k[b, :, out], v[b, :, out], bias[b, :, :, out] = NAN, INF, NAN
        m[b, :, ~case.mask[b]] = NAN
    return replace(case, q=q, k=k, v=v, key_weights=m, bias=bias), grad


def _without_keys(dtype: torch.dtype, reason: str) -> Case:
    """Some queries have keys, the others none for this reason. Where the bias is shared, both add to its gradient."""
    batch, heads, queries, keys = 2, 4, 40, 70
    case = qkv(dtype, batch, heads, 2, queries, keys, 24)
    m = weights(batch, heads, keys) + 0.01
    mask = torch.ones(batch, keys, dtype=torch.bool)
    bias = torch.randn(1, heads, queries, keys)
    if reason == "mask":
        mask[1] = False
    elif reason == "causal":
        mask[:, :10] = False
        case, bias = replace(case, causal=True), torch.randn(1, 1, 1, keys)
    elif reason == "bias":
        bias[:, :, ::3] = -INF
    elif reason == "lengths":
        case = replace(case, lengths=torch.tensor([keys, 0]), query_lengths=torch.tensor([35, queries]))
    else:
        m[0, 1] = m[1, 2] = 0.0
        case = replace(case, exact_zero_weight_grad=reason == "weights, exact gradient")
    return replace(case, key_weights=m, mask=mask, bias=bias)


@pytest.mark.parametrize("reason", ["mask", "causal", "bias", "lengths", "weights", "weights, exact gradient"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_query_without_a_key_may_have_nan_upstream(machine: Machine, dtype: torch.dtype, reason: str) -> None:
    """`check` puts NaN in both upstream gradients of such queries."""
    got = check(machine, _without_keys(dtype, reason))
    without = got.lse == -INF
    assert 0 < int(without.sum()) < without.numel()
    assert all(grad.isfinite().all() for grad in got.grads.values())
    assert not got.grads["q"][without].any()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_may_hold_nan(machine: Machine, dtype: torch.dtype, exact: bool) -> None:
    """The same bits as with ordinary numbers there. (The exact mode reads keys of weight 0: they stay ordinary.)"""
    m = weights(2, 1, 70) if not exact else torch.rand(2, 1, 70)
    case = _everything(dtype, mask=torch.rand(2, 70) > 0.2)
    case = replace(case, key_weights=m.expand(-1, 4, -1).clone(), exact_zero_weight_grad=exact)
    poisoned, grad = poison(case)
    clean = run(machine, case, grad.nan_to_num(0.5), None)
    got = run(machine, poisoned, grad, None)
    assert not clean.out.isnan().any()
    assert same(got.out, clean.out)
    assert same(got.lse, clean.lse)
    for name in got.grads:
        assert same(got.grads[name], clean.grads[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["k", "v", "m"])
def test_nan_in_a_key_that_counts_shows(machine: Machine, dtype: torch.dtype, where: str) -> None:
    case = replace(qkv(dtype, 1, 1, 1, 5, 70, 16), key_weights=torch.rand(1, 70))
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32)  # a GPU's own, all bits but the sign
    {"k": case.k[0, 0], "v": case.v[0, 0], "m": case.key_weights[0]}[where][69] = nan
    got = run(machine, case, torch.ones_like(case.q), None)
    assert got.out.isnan().all()
    assert got.grads["q"].isnan().all()
    assert got.grads["k"].isnan().all()
    assert got.grads["v"].isnan().all() or where == "v"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_gradient_of_weights_that_are_zero(machine: Machine, dtype: torch.dtype) -> None:
    m = weights(2, 4, 70)
    got = check(machine, replace(_everything(dtype), key_weights=m, exact_zero_weight_grad=True))
    assert got.grads["weights"][:, :, :33][m[:, :, :33] == 0].any()
    default = check(machine, replace(_everything(dtype), key_weights=m))
    assert not default.grads["weights"][m == 0].any()


def test_exact_gradient_saturates(machine: Machine) -> None:
    """A key of weight 0 far above all others: e^(x - lse) overflows, the gradient is large and finite."""
    case = replace(qkv(F32, 1, 1, 1, 3, 5, 8), key_weights=torch.tensor([[1.0, 0.5, 0.0, 1.0, 1.0]]))
    case.k[0, 0, 2] = 300 * case.q[0, 0].mean(0)
    case = replace(case, q=case.q.abs(), k=case.k.abs(), exact_zero_weight_grad=True)
    got = run(machine, case, torch.ones_like(case.q), None)
    assert got.grads["weights"].isfinite().all()
    assert float(got.grads["weights"].abs().max()) > 1e20
    near(got.out, attention(case.q, case.k, case.v, case.key_weights)[0], 2e-6, "output")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-7, 1e-20, 1e-37, 1e-41])
def test_small_weights_lose_nothing(machine: Machine, dtype: torch.dtype, size: float) -> None:
    """m scaled by a constant changes p not at all: not by float16's range, nor below the smallest normal float."""
    case = qkv(dtype, 1, 1, 1, 9, 70, 16)
    m = (size * (0.5 + torch.rand(1, 70))).float()
    out, lse = machine.forward(replace(case, key_weights=m).call(machine))
    expected, expected_lse = attention(case.q.double(), case.k.double(), case.v.double(), m.double())
    near(out, expected, TOLERANCES[dtype][0], "output")
    near(lse, expected_lse, LSE_TOLERANCE, "log-sum-exp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("faint", [1e-42, 1e-37, 1e-25])
def test_queries_that_see_faint_keys_alone(machine: Machine, dtype: torch.dtype, faint: float) -> None:
    """e^(x - lse) is as large as their weights are small, and p is not small at all."""
    m = torch.tensor([[faint, faint, 1.0, faint, 0.5, 0.0]])
    case = replace(qkv(dtype, 1, 2, 1, 6, 6, 16), key_weights=m, bias=torch.randn(1, 1, 6, 6), causal=True)
    check(machine, case, overflows={"weights"} if faint < 1e-38 else frozenset(), rounding=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_faint_keys_beside_others(machine: Machine, dtype: torch.dtype) -> None:
    """Their own gradient is no smaller than that of the others."""
    m = torch.tensor([[1e-42, 1e-37, 1e-25, 1.0, 0.5, 0.0]])
    got = check(machine, replace(qkv(dtype, 1, 2, 1, 6, 6, 16), key_weights=m))
    assert (got.grads["weights"][..., :5] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_drops_the_entries_of_the_generator(machine: Machine, dtype: torch.dtype) -> None:
    """With v and the upstream gradient the identity, the output shows p and dv shows p transposed."""
    case = replace(qkv(dtype, 2, 2, 2, 64, 64, 64), dropout_p=0.5)
    identity = torch.eye(64).to(dtype).expand(2, 2, 64, 64)
    got = run(machine, replace(case, v=identity.contiguous()), identity.contiguous(), None)
    keep = attention_keep_mask(2, 2, 64, 64, 0.5, case.seed, torch.device("cpu"))
    assert torch.equal(got.out != 0, keep)
    assert torch.equal(got.grads["v"].mT != 0, keep)


EMPTY_SIZES = [(0, 2, 2, 5, 5, 8), (2, 0, 0, 5, 5, 8), (2, 2, 1, 0, 5, 8), (2, 2, 1, 5, 0, 8)]


@pytest.mark.parametrize("size", EMPTY_SIZES, ids=str)
def test_empty_sizes(machine: Machine, size: tuple[int, ...]) -> None:
    batch, heads, _, queries, keys, _ = size
    bias = torch.randn(1, 1, max(queries, 1), keys)
    case = replace(qkv(F32, *size), key_weights=torch.rand(batch, keys), bias=bias)
    got = run(machine, case, torch.randn(case.q.shape), None)
    assert not got.out.any()
    assert torch.equal(got.lse, torch.full((batch, heads, queries), -INF))
    assert all(not grad.any() for grad in got.grads.values())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_half_types_beside_plain_pytorch(machine: Machine, dtype: torch.dtype) -> None:
    """At most twice the error of the same computation in PyTorch's operations of that type, both against float64."""
    case = qkv(dtype, 2, 2, 2, 129, 129, 64)
    grad = torch.randn(case.q.shape).to(dtype)

    def differentiate(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]

    exact = differentiate(case.q.double(), case.k.double(), case.v.double())
    plain = differentiate(case.q, case.k, case.v)
    got = run(machine, case, grad, None)
    for ours, theirs, expected in zip((got.out, *(got.grads[x] for x in "qkv")), plain, exact, strict=True):
        limit = 2 * float((theirs.double() - expected).abs().max())
        assert float((ours.double() - expected).abs().max()) <= limit


def test_widths_above_128_are_refused(machine: Machine) -> None:
    with pytest.raises(AssertionError, match="error 1"):
        machine.forward(qkv(F32, 1, 1, 1, 3, 3, 129).call(machine))


def test_an_access_beyond_an_array_is_found(machine: Machine) -> None:
    """The guard pages work: values of fewer keys than there are end the launch."""
    case = qkv(BF16, 1, 1, 1, 64, 64, 64)
    with pytest.raises(AssertionError, match="error 719"):
        machine.forward(replace(case, v=case.v[:, :, :60].clone()).call(machine))

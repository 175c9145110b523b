"""The Triton attention against the float64 reference: under the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from attention_triton_problem import TOLERANCE, Problem, check, distance, tensors, weights

from mmer_fast.triton import attention as kernels
from mmer_fast.triton import attention_backward, attention_backward_bias, attention_forward
from mmer_fast.triton.attention_tiles import Tile, tile_for

INF, NAN = math.inf, math.nan


@pytest.fixture
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks along queries and keys of the usual problem: the interpreter pays for each."""
    for module in (attention_forward, attention_backward):
        monkeypatch.setattr(module, "tile_for", lambda *_: Tile(32, 64, 4, 1))


@pytest.mark.parametrize("width", [1, 24, 64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 129), (7, 49), (129, 7)])
def test_sizes(queries: int, keys: int, width: int) -> None:
    check(Problem(*tensors(queries, keys, width, batch=1, heads=1), key_weights=weights(1, keys)))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights of each head": {"key_weights": weights(2, 2, 70)},
    "mask": {"mask": torch.rand(2, 70) < 0.6},
    "lengths": {"lengths": torch.tensor([70, 13]), "query_lengths": torch.tensor([0, 40])},
    "more than all": {"lengths": torch.tensor([999, 0]), "query_lengths": torch.tensor([71, 2**40])},
    "causal": {"causal": True, "key_weights": weights(2, 70)},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 7},
    "dropout by half": {"dropout_p": 0.5, "seed": -3, "key_weights": weights(2, 70)},
    "no key": {"key_weights": torch.zeros(2, 70).index_fill(0, torch.tensor([1]), 0.5)},
    "all": {
        "key_weights": weights(2, 2, 70),
        "mask": torch.rand(2, 70) < 0.9,
        "bias": torch.randn(2, 1, 49, 70),
        "lengths": torch.tensor([66, 69]),
        "query_lengths": torch.tensor([48, 33]),
        "causal": True,
        "dropout_p": 0.1,
    },
}


@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any]) -> None:
    check(Problem(*tensors(49, 70), **options))


@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_bias_that_is_broadcast(batch: int, heads: int, queries: int) -> None:
    bias = torch.randn(batch, heads, queries, 70)
    bias[torch.rand(bias.shape) < 0.2] = -INF
    check(Problem(*tensors(20, 70), key_weights=weights(2, 70), bias=bias, lengths=torch.tensor([70, 50])))


@pytest.mark.usefixtures("few_tiles")
def test_bias_whose_terms_are_split_into_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(*tensors(7, 9, heads=3), bias=torch.randn(1, 1, 1, 9))
    for programs in (1, 4, 1024):  # 6, 2 and 1 terms a slice
        monkeypatch.setattr(attention_backward_bias, "PROGRAMS", programs)
        check(problem)


@pytest.mark.usefixtures("few_tiles")
def test_bias_that_is_a_view() -> None:
    q, k, v = tensors(33, 20)
    for bias in (
        torch.randn(1, 2, 1, 20).expand(2, 2, 33, 20),
        torch.randn(20, 33).T[None, None],
        torch.randn(2, 1, 33, 40)[..., ::2],
    ):
        check(Problem(q, k, v, bias=bias))


@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_heads_that_share_keys(key_heads: int, per_head: bool) -> None:
    m = weights(2, 4, 20) if per_head else weights(2, 20)
    options = {"bias": torch.randn(1, 4, 1, 20), "dropout_p": 0.2, "causal": True}
    check(Problem(*tensors(9, 20, heads=4, key_heads=key_heads), key_weights=m, **options))


@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_packed(causal: bool, per_head: bool) -> None:
    m = weights(4, 2, 70) if per_head else weights(4, 70)
    check(
        Problem(
            *tensors(49, 70, batch=4, key_heads=1),
            key_weights=m,
            bias=torch.randn(4, 1, 1, 70),
            packed=True,
            lengths=torch.tensor([3, 0, 70, 11]),
            query_lengths=torch.tensor([1, 5, 49, 0]),
            causal=causal,
            dropout_p=0.25,
        )
    )


@pytest.mark.usefixtures("few_tiles")
def test_padding_may_hold_anything() -> None:
    lengths, query_lengths = torch.tensor([70, 33]), torch.tensor([20, 49])
    m, mask = weights(2, 2, 70), torch.rand(2, 70) < 0.8
    valid = (torch.arange(70) < lengths[:, None]) & mask
    problem = Problem(
        *tensors(49, 70), key_weights=m, mask=mask, lengths=lengths, query_lengths=query_lengths,
        bias=torch.randn(2, 1, 1, 70),
    )  # fmt: skip
    padded = torch.arange(49) >= query_lengths[:, None]
    for x in (problem.q, problem.grad, problem.grad_lse):
        x.transpose(1, 2)[padded] = NAN
    problem.k.transpose(1, 2)[~valid] = INF
    problem.v.transpose(1, 2)[~valid] = NAN
    problem.k[m == 0] = NAN
    problem.v[m == 0] = NAN
    problem.bias[:, 0, 0][~valid] = NAN
    m.transpose(1, 2)[~valid] = NAN
    with np.errstate(invalid="ignore"):  # a row of keys that is left out may hold NaN, which is not stored
        check(problem)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("which", ["q", "k", "v", "key_weights"])
def test_a_nan_that_counts_shows(which: str) -> None:
    problem = Problem(*tensors(9, 20), key_weights=torch.ones(2, 20))
    tensor = getattr(problem, which)
    tensor[0].view(-1)[0] = NAN
    with np.errstate(invalid="ignore"):
        out, lse = problem.forward()
    seen = {"q": (0, 0, 0), "k": (0, 0), "v": (0, 0), "key_weights": (0,)}[which]
    assert out[seen].isnan().any(-1).all()
    assert lse[seen].isnan().all() == (which != "v")
    assert out[1].isfinite().all()


@pytest.mark.usefixtures("few_tiles")
def test_gradients_of_weights_at_zero() -> None:
    m = weights(2, 2, 20)
    m[1, 1] = 0.0  # a query without a key has no gradient either
    options = {"mask": torch.rand(2, 20) < 0.8, "lengths": torch.tensor([20, 17]), "bias": torch.randn(1, 1, 9, 20)}
    check(Problem(*tensors(9, 20), key_weights=m, exact=True, **options))
    check(Problem(*tensors(9, 20, heads=4, key_heads=2), key_weights=weights(2, 20), exact=True, causal=True))


def test_gradients_of_weights_at_zero_are_finite_under_large_scores() -> None:
    problem = Problem(*tensors(9, 20), key_weights=weights(2, 20), exact=True)
    problem.k *= 1000
    gradients = problem.backward(*problem.forward())
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[3].abs().max() > 2.0**100


def test_weights_near_zero_have_finite_gradients() -> None:
    m = torch.ones(1, 20)
    m[0, ::3] = 1e-30
    check(Problem(*tensors(9, 20, batch=1), key_weights=m))


@pytest.mark.usefixtures("few_tiles")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # dm of 1e-42
@pytest.mark.parametrize("faint", [1e-42, 1e-37, 1e-25])
def test_queries_that_see_faint_keys_alone(faint: float) -> None:
    """e^(x - lse) is as large as their weights are small, and p is not small at all."""
    m = torch.tensor([[faint, faint, 1.0, faint, 0.5, 0.0]])
    problem = Problem(*tensors(6, 6, batch=1), key_weights=m, bias=torch.randn(1, 1, 6, 6), causal=True)
    check(problem, rounding=4, overflows=(3,) if faint < 1e-38 else ())


@pytest.mark.usefixtures("few_tiles")
def test_faint_keys_beside_others() -> None:
    """Their own gradient is no smaller than that of the others."""
    problem = Problem(*tensors(6, 6, batch=1), key_weights=torch.tensor([[1e-42, 1e-37, 1e-25, 1.0, 0.5, 0.0]]))
    check(problem)
    assert (problem.run()[5][..., :5] != 0).all()


@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-7, 1e-20, 1e-37, 1e-41])
def test_small_weights_lose_nothing(dtype: torch.dtype, size: float) -> None:
    """m scaled by a constant changes p not at all: not by float16's range, nor below the smallest normal float."""
    problem = Problem(*tensors(9, 20, dtype=dtype), key_weights=size * (0.5 + torch.rand(2, 20)))
    expected = problem.reference()
    out, lse = problem.forward()
    assert distance(out, expected[0]) <= max(4 * TOLERANCE, torch.finfo(dtype).eps)  # a score has log2 m
    assert distance(lse, expected[1]) <= TOLERANCE


@pytest.mark.usefixtures("few_tiles")
def test_views() -> None:
    q = torch.randn(49, 2, 2, 16).permute(1, 2, 0, 3)  # [L, B, H, D]
    k = torch.randn(2, 2, 24, 70).transpose(2, 3)[..., 3:19]  # keys side by side
    v = torch.randn(2, 2, 3, 70, 16)[:, :, 1]
    m, mask = torch.rand(70, 2).T, torch.rand(2, 140)[:, ::2] < 0.8
    problem = Problem(q, k, v, key_weights=m, mask=mask)
    problem.grad = torch.ones(1, 1, 1, 1).expand(q.shape)
    problem.grad_lse = torch.randn(49, 2, 2).permute(1, 2, 0)
    check(problem)
    check(replace(problem, key_weights=torch.rand(70, 1, 2).permute(2, 1, 0).expand(2, 2, 70)))


def test_no_gradient_of_the_log_sum_exp() -> None:
    problem = Problem(*tensors(9, 20))
    problem.grad_lse = None
    check(problem)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
def test_nothing_to_do(sizes: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = sizes
    bias = torch.randn(1, 1, 1, keys)
    q, k, v = tensors(queries, keys, batch=batch, heads=heads)
    check(Problem(q, k, v, key_weights=torch.ones(batch, keys), bias=bias))
    none = torch.zeros(batch, dtype=torch.int64)
    check(Problem(q, k, v, lengths=none, query_lengths=none, packed=batch > 0))


def test_no_head() -> None:
    problem = Problem(*tensors(5, 7, heads=0), key_weights=torch.ones(2, 7), bias=torch.randn(1, 1, 1, 7))
    *others, grad_bias = problem.run()
    assert [x.numel() for x in others] == [0] * 6
    assert grad_bias.shape == (1, 1, 1, 7)
    assert (grad_bias == 0).all()


def plain(problem: Problem) -> tuple[Tensor, ...]:
    """The same computation in plain PyTorch of the tensors' type: out and the gradients of q, k, v."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    x = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    e = (x - x.detach().amax(-1, keepdim=True)).exp() * problem.key_weights[:, None, None].to(x.dtype)
    out = (e / e.sum(-1, keepdim=True)) @ v
    return out.detach(), *torch.autograd.grad(out, (q, k, v), problem.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(7, 49), (70, 20)])
def test_half_types_are_as_accurate_as_plain_pytorch(queries: int, keys: int, dtype: torch.dtype) -> None:
    problem = Problem(*tensors(queries, keys, 64, dtype=dtype), key_weights=weights(2, keys))
    problem.grad_lse = None
    out, lse, *gradients = problem.run()
    expected = problem.reference()
    usual = plain(problem)
    for got, rounded, wanted in zip((out, *gradients[:3]), usual, (expected[0], *expected[2:5]), strict=True):
        assert distance(got, wanted) <= 2 * distance(rounded, wanted)
    assert distance(lse, expected[1]) <= TOLERANCE
    assert distance(gradients[3], expected[5]) <= 2 * max(map(distance, usual[1:], expected[2:5]))


@pytest.mark.usefixtures("few_tiles")
def test_two_runs_give_the_same_bits() -> None:
    problem = Problem(*tensors(49, 70, key_heads=1), **OPTIONS["all"])
    for first, second in zip(problem.run(), problem.run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("direction", ["forward", "queries", "keys", "bias"])
def test_tiles_fit_what_they_serve(direction: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (1, 16, 33, 64, 128):
            for length in (1, 16, 17, 50, 1000, 10**6):
                tile = tile_for(direction, dtype, width, length, 2 * length)
                for block, tokens in ((tile.queries, length), (tile.keys, 2 * length)):
                    assert 16 <= block <= 128
                    assert block & (block - 1) == 0
                    assert block < 2 * max(16, tokens)


def test_widths() -> None:
    assert kernels.unsupported(128) is None
    assert "128" in kernels.unsupported(129)
    with pytest.raises(ValueError, match="at most 128"):
        Problem(*tensors(2, 3, 129)).forward()

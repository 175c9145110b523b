"""Consistency losses between two predictions, against sums written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mmer_fast as mf

LOGITS = torch.tensor([[0.3, -2.0, 4.0], [1.5, 0.0, -6.0]], dtype=torch.float64)
OTHER = torch.tensor([[1.3, -1.0, 3.0], [-0.5, 0.2, -7.0]], dtype=torch.float64)
BOTH = pytest.mark.parametrize("divergence", [mf.bernoulli_kl_with_logits, mf.softmax_kl_with_logits])
Divergence = Callable[..., Tensor]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bernoulli_rows(p_logits: Tensor, q_logits: Tensor) -> list[float]:
    rows = []
    for a_row, b_row in zip(p_logits.tolist(), q_logits.tolist(), strict=True):
        pairs = [(sigmoid(a), sigmoid(b)) for a, b in zip(a_row, b_row, strict=True)]
        rows.append(sum(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)) for p, q in pairs))
    return rows


def test_bernoulli_kl_is_eq_13_summed_over_labels() -> None:
    rows = bernoulli_rows(LOGITS, OTHER)
    for reduction, expected in (("batchmean", sum(rows) / 2), ("sum", sum(rows)), ("none", rows)):
        got = mf.bernoulli_kl_with_logits(LOGITS, OTHER, reduction=reduction)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


def test_bernoulli_kl_is_zero_for_equal_and_positive_for_other_logits() -> None:
    assert mf.bernoulli_kl_with_logits(LOGITS, LOGITS).item() == 0
    assert mf.bernoulli_kl_with_logits(LOGITS, OTHER).item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bernoulli_kl_is_stable_at_large_logits(dtype: torch.dtype) -> None:
    target = torch.tensor([[1000.0, -1000.0, 100.0]], dtype=dtype, requires_grad=True)
    logits = torch.tensor([[-1000.0, -1000.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = mf.bernoulli_kl_with_logits(target, logits)
    loss.backward()
    torch.testing.assert_close(loss.item(), 1000 + math.log(2), rtol=1e-6, atol=0)
    assert logits.grad is not None
    assert target.grad is not None
    # d KL / d q_logits = q - p
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 0.0, -0.5]], dtype=dtype))
    assert target.grad.isfinite().all()


def test_small_probabilities_keep_their_digits() -> None:
    """p = 1 - 2e-9 and 1 - 1e-9 are the same float32, their logits are not."""
    p_logits, q_logits = torch.tensor([[20.0]]), torch.tensor([[20.7]])
    expected = mf.bernoulli_kl_with_logits(p_logits.double(), q_logits.double()).item()
    torch.testing.assert_close(mf.bernoulli_kl_with_logits(p_logits, q_logits).item(), expected, rtol=1e-5, atol=0)


def test_softmax_kl_is_the_authors() -> None:
    total = 0.0
    for a_row, b_row in zip(LOGITS.tolist(), OTHER.tolist(), strict=True):
        p = [math.exp(sigmoid(a)) for a in a_row]
        q = [math.exp(sigmoid(b)) for b in b_row]
        total += sum(pi / sum(p) * math.log((pi / sum(p)) / (qi / sum(q))) for pi, qi in zip(p, q, strict=True))
    torch.testing.assert_close(mf.softmax_kl_with_logits(LOGITS, OTHER).item(), total / 6, rtol=1e-10, atol=0)
    assert mf.softmax_kl_with_logits(LOGITS, OTHER, reduction="none").shape == (2, 3)
    torch.testing.assert_close(
        mf.softmax_kl_with_logits(LOGITS, OTHER, reduction="sum").item(), total, rtol=1e-10, atol=0
    )


@BOTH
def test_gradients_and_second_derivatives_in_both_arguments(divergence: Divergence) -> None:
    p, q = LOGITS.clone().requires_grad_(), OTHER.clone().requires_grad_()
    assert torch.autograd.gradcheck(divergence, (p, q))
    assert torch.autograd.gradgradcheck(divergence, (p, q))


@BOTH
def test_compiles_and_maps(divergence: Divergence) -> None:
    compiled = torch.compile(divergence, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LOGITS, OTHER), divergence(LOGITS, OTHER))
    mapped = torch.func.vmap(divergence)(LOGITS[:, None], OTHER[:, None])
    one_by_one = torch.stack([divergence(a[None], b[None]) for a, b in zip(LOGITS, OTHER, strict=True)])
    torch.testing.assert_close(mapped, one_by_one)


@BOTH
def test_half_types_compute_in_float32(divergence: Divergence) -> None:
    p, q = LOGITS.to(torch.bfloat16), OTHER.to(torch.bfloat16)
    got = divergence(p, q)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, divergence(p.float(), q.float()))


@BOTH
def test_errors_name_the_argument(divergence: Divergence) -> None:
    with pytest.raises(TypeError, match=r"p_logits must be a torch.Tensor, got list"):
        divergence([0.0], OTHER)
    with pytest.raises(TypeError, match=r"q_logits must be float32, float64, bfloat16 or float16, got torch.int64"):
        divergence(LOGITS, OTHER.long())
    with pytest.raises(ValueError, match=r"one shape \(\.\.\., K\), got \(2, 3\) and \(3,\)"):
        divergence(LOGITS, OTHER[0])
    with pytest.raises(ValueError, match=r"reduction must be .*mean', 'sum' or 'none', got 'average'"):
        divergence(LOGITS, OTHER, reduction="average")

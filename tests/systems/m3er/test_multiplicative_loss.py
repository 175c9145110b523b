"""The multiplicative fusion loss, original and modified, against the sums written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.systems.m3er import multiplicative_loss

LABELS = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
PRESENT = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
FORMS = [("original", "own"), ("modified", "own"), ("modified", "others")]


def drawn() -> Tensor:
    return 2 * torch.randn(3, 4, 2, dtype=torch.float64)


def written_out(p: list[float], beta: float, form: str, weight: str) -> float:
    """c of the probabilities that the modalities of a sample give to the true class."""
    total = 0.0
    for i in range(len(p)):
        factor = 1.0
        if len(p) > 1:
            power = beta / (len(p) - 1)
            others = [p[j] for j in range(len(p)) if j != i]
            if form == "original":
                factor = math.prod((1 - q) ** power for q in others)
            elif weight == "others":
                factor = math.prod(q**power for q in others)
            else:
                factor = p[i] ** power
        total -= factor * math.log(p[i])
    return total


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("form", "weight"), FORMS)
def test_the_equations_written_out(form: str, weight: str, beta: float) -> None:
    logits = drawn()
    got = multiplicative_loss(logits, LABELS, PRESENT, beta=beta, form=form, weight=weight)
    for b in range(4):
        for k in range(2):
            ones = [1 / (1 + math.exp(-logits[m, b, k].item())) for m in range(3) if PRESENT[b, m]]
            p = [q if LABELS[b, k] else 1 - q for q in ones]
            assert got[b, k].item() == pytest.approx(written_out(p, beta, form, weight), rel=1e-10)


def test_defaults() -> None:
    logits = drawn()
    expected = multiplicative_loss(logits, LABELS, beta=1.0, form="modified", weight="own", detach_weights=False)
    assert torch.equal(multiplicative_loss(logits, LABELS), expected)


def test_without_beta_it_is_the_sum_of_cross_entropies() -> None:
    logits = drawn()
    expected = sum(F.binary_cross_entropy_with_logits(x, LABELS, reduction="none") for x in logits)
    torch.testing.assert_close(multiplicative_loss(logits, LABELS, beta=0.0), expected)


@pytest.mark.parametrize(("form", "weight"), FORMS)
def test_gradients_are_those_of_finite_differences(form: str, weight: str) -> None:
    def loss(logits: Tensor) -> Tensor:
        return multiplicative_loss(logits, LABELS, PRESENT, beta=1.5, form=form, weight=weight)

    assert torch.autograd.gradcheck(loss, drawn().requires_grad_())


@pytest.mark.parametrize(("form", "weight"), FORMS)
def test_detached_weights_scale_each_modalitys_cross_entropy(form: str, weight: str) -> None:
    logits = drawn().requires_grad_()
    options = {"beta": 1.5, "form": form, "weight": weight}
    loss = multiplicative_loss(logits, LABELS, detach_weights=True, **options)
    torch.testing.assert_close(loss, multiplicative_loss(logits, LABELS, **options))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    plain = sum(F.binary_cross_entropy_with_logits(x, LABELS, reduction="sum") for x in logits)
    (unweighted,) = torch.autograd.grad(plain, logits)
    weights = gradient / unweighted
    assert ((weights > 0) & (weights < 1)).all()
    p = torch.where(LABELS > 0, logits, -logits).sigmoid()
    expected = {
        ("original", "own"): (1 - p).prod(dim=0) / (1 - p),
        ("modified", "own"): p,
        ("modified", "others"): p.prod(dim=0) / p,
    }[form, weight]
    torch.testing.assert_close(weights, expected**0.75)


def test_a_gradient_through_own_weights_gives_up_on_what_is_wrong() -> None:
    """Below p = e^(−1/γ), here e^(−2), the loss falls when p does; not so with detached weights."""
    logits = torch.tensor([-3.0, -1.0], dtype=torch.float64).expand(3, 1, 2).clone().requires_grad_()
    for detach, signs in ((False, [1.0, -1.0]), (True, [-1.0, -1.0])):
        loss = multiplicative_loss(logits, torch.ones(1, 2), beta=1.0, detach_weights=detach)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient[0, 0].sign().tolist() == signs


@pytest.mark.parametrize(("form", "weight"), FORMS)
def test_absent_modalities_may_hold_anything(form: str, weight: str) -> None:
    logits = drawn()
    spoilt = logits.masked_fill(~PRESENT.T[..., None], torch.nan).requires_grad_()
    got = multiplicative_loss(spoilt, LABELS, PRESENT, form=form, weight=weight)
    torch.testing.assert_close(got, multiplicative_loss(logits, LABELS, PRESENT, form=form, weight=weight))
    got.sum().backward()
    assert spoilt.grad.isfinite().all()
    assert not spoilt.grad[~PRESENT.T].any()


@pytest.mark.parametrize(("form", "weight"), FORMS)
@pytest.mark.parametrize("size", [40.0, 1000.0])
def test_certain_logits_stay_finite(form: str, weight: str, size: float) -> None:
    logits = torch.tensor([[[size, -size]], [[-size, size]]], requires_grad=True)
    loss = multiplicative_loss(logits, torch.tensor([[1.0, 1.0]]), beta=2.0, form=form, weight=weight)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_mbk": torch.randn(4, 2)}, r"logits must be floating of shape \(M >= 1, B, K\)"),
        ({"labels_bk": torch.ones(4, 3)}, r"labels must have shape \(4, 2\), got \(4, 3\)"),
        ({"present_bm": torch.ones(3, 4, dtype=torch.bool)}, r"present must be bool of shape \(4, 3\)"),
        ({"present_bm": torch.ones(4, 3)}, "present must be bool"),
        ({"beta": -1.0}, "beta must be at least 0, got -1.0"),
        ({"form": "new"}, "form must be one of original, modified, got 'new'"),
        ({"weight": "all"}, "weight must be one of own, others, got 'all'"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiplicative_loss(**{"logits_mbk": drawn(), "labels_bk": LABELS, **change})

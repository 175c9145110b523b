"""SAM's steps: their values against the formulas, both interfaces, gradients that are missing, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sam_loops import (
    assert_same_state,
    bits,
    loss_of,
    reference_step,
    same_bits,
    small_batches,
    small_model,
    train,
)
from torch import Tensor, nn

from mmer_fast.optim import SAM

SGD: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "fused": True}),
    (torch.optim.SGD, {"lr": 0.1, "nesterov": True, "momentum": 0.8, "foreach": True}),
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.Adam, {"lr": 0.01, "foreach": True}),
    (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    (torch.optim.RMSprop, {"lr": 0.01}),
]
FORMULAS = [("global", False), ("tensor", False), ("awp", False), ("global", True), ("tensor", True)]


@pytest.mark.parametrize(("scope", "adaptive"), FORMULAS)
@pytest.mark.parametrize("base", [BASES[0], BASES[3]], ids=["SGD", "Adam"])
def test_a_step_is_that_of_the_formula(base: tuple[Any, dict[str, Any]], scope: str, adaptive: bool) -> None:
    model = small_model(torch.float64)
    twin = copy.deepcopy(model)
    batches = small_batches(3, torch.float64)
    optimizer = SAM(model.parameters(), base[0], 0.3, adaptive, scope=scope, **base[1])
    train(model, optimizer, batches)
    plain = base[0](twin.parameters(), **base[1])
    for batch in batches:
        reference_step(plain, twin, batch, 0.3, scope, adaptive)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    assert_same_state(optimizer, plain, rtol=1e-10, atol=1e-13)


def test_a_step_by_hand() -> None:
    w = nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    (w**2).sum().backward()  # g = (6, -8), |g| = 10
    optimizer.first_step(zero_grad=True)
    torch.testing.assert_close(w.detach(), torch.tensor([3.3, -4.4], dtype=torch.float64), rtol=1e-15, atol=0)
    (w**2).sum().backward()  # (6.6, -8.8)
    optimizer.second_step()
    torch.testing.assert_close(w.detach(), torch.tensor([2.34, -3.12], dtype=torch.float64), rtol=1e-15, atol=0)
    assert w.grad is not None  # not asked to clear it
    assert optimizer.last_info[0].norm.item() == pytest.approx(10)
    assert optimizer.last_info[0].factor.item() == pytest.approx(0.05)


@pytest.mark.parametrize("base", BASES, ids=lambda base: "-".join([base[0].__name__, *base[1]]))
def test_many_steps_follow_the_loop_of_clones(base: tuple[Any, dict[str, Any]]) -> None:
    model = small_model()
    twin = copy.deepcopy(model)
    batches = small_batches(10)
    optimizer = SAM(model.parameters(), base[0], rho=0.1, **base[1])
    train(model, optimizer, batches)
    plain = base[0](twin.parameters(), **base[1])
    for batch in batches:
        reference_step(plain, twin, batch, 0.1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)
    assert_same_state(optimizer, plain, rtol=1e-4, atol=2e-6)


def test_radius_zero_is_the_base_optimizer_bit_for_bit() -> None:
    model = small_model()
    twin = copy.deepcopy(model)
    batches = small_batches(5)
    train(model, SAM(model.parameters(), rho=0.0, **SGD), batches)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        plain.zero_grad()
        loss_of(twin, batch).backward()
        plain.step()
    assert same_bits(model, bits(twin))


@pytest.mark.parametrize("backward_first", [False, True])
def test_a_closure_does_what_the_two_calls_do(backward_first: bool) -> None:
    model = small_model()
    twin = copy.deepcopy(model)
    batches = small_batches(4)
    expected = train(twin, SAM(twin.parameters(), rho=0.1, **SGD), batches)
    optimizer = SAM(model.parameters(), rho=0.1, **SGD)
    calls = 0
    for batch, clean in zip(batches, expected, strict=True):

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            if not backward_first:
                optimizer.zero_grad()
            loss = loss_of(model, batch)  # noqa: B023  called within the iteration
            loss.backward()
            return loss

        if backward_first:
            loss_of(model, batch).backward()
        loss = optimizer.step(closure)
        assert loss.requires_grad
        if backward_first:
            assert loss.item() > clean  # that of the perturbed pass, the only one that the closure saw
        else:
            assert loss.item() == clean
        assert all(p.grad is None for p in model.parameters())
    assert calls == len(batches) * (1 if backward_first else 2)
    assert same_bits(model, bits(twin))


def test_gradients_accumulate_in_both_passes() -> None:
    model = small_model(torch.float64)
    twin = copy.deepcopy(model)
    (x, y), *_ = small_batches(1, torch.float64)
    train(twin, SAM(twin.parameters(), rho=0.1, **SGD), [(x, y)])
    optimizer = SAM(model.parameters(), rho=0.1, **SGD)
    for move in (optimizer.first_step, optimizer.second_step):
        for half in ((x[:8], y[:8]), (x[8:], y[8:])):
            (loss_of(model, half) / 2).backward()
        move(zero_grad=True)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_weights_come_back_bit_for_bit_without_a_step() -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), rho=0.5, **SGD)
    before, (batch, *_) = bits(model), small_batches(1)
    loss_of(model, batch).backward()
    assert not optimizer.perturbed
    optimizer.first_step(zero_grad=True)
    assert optimizer.perturbed
    assert not same_bits(model, before)
    assert all(p.grad is None for p in model.parameters())
    optimizer.restore_()
    assert not optimizer.perturbed
    assert same_bits(model, before)
    optimizer.restore_()  # nothing left to do
    train(model, optimizer, [batch])
    assert not same_bits(model, before)


def test_groups_with_their_own_radius_share_one_norm() -> None:
    for adaptive in (False, True):
        model = small_model(torch.float64)
        twin = copy.deepcopy(model)
        groups = [{"params": model[0].parameters(), "rho": 0.4, "lr": 0.05}, {"params": model[2].parameters()}]
        plain = torch.optim.SGD(
            [{"params": twin[0].parameters(), "lr": 0.05}, {"params": twin[2].parameters()}], lr=0.1
        )
        optimizer = SAM(groups, torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.1)
        for batch in small_batches(3, torch.float64):
            train(model, optimizer, [batch])
            reference_step(plain, twin, batch, [0.4, 0.1], adaptive=adaptive)
        assert [info.norm.item() for info in optimizer.last_info] == [optimizer.last_info[0].norm.item()] * 2
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_groups_with_their_own_radius_of_a_class_of_parameters() -> None:
    class Marked(torch.nn.Parameter):
        pass

    model = small_model(torch.float64)
    twin = copy.deepcopy(model)
    model[0].weight = Marked(model[0].weight.detach())
    batch = small_batches(1, torch.float64)[0]
    for each in (model, twin):
        groups = [{"params": each[0].parameters(), "rho": 0.4}, {"params": each[2].parameters()}]
        train(each, SAM(groups, torch.optim.SGD, rho=0.1, lr=0.1), [batch])
    assert type(model[0].weight) is Marked
    assert same_bits(model, bits(twin))


def test_groups_with_their_own_radius_and_norms_of_tensors() -> None:
    model = small_model(torch.float64)
    twin = copy.deepcopy(model)
    groups = [{"params": model[0].parameters(), "rho": 0.4}, {"params": model[2].parameters(), "rho": 0.0}]
    optimizer = SAM(groups, scope="tensor", **SGD)
    plain = torch.optim.SGD([{"params": m.parameters()} for m in (twin[0], twin[2])], lr=0.1, momentum=0.9)
    batch, *_ = small_batches(1, torch.float64)
    train(model, optimizer, [batch])
    reference_step(plain, twin, batch, [0.4, 0.0], "tensor")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_groups_with_their_own_radius_and_views_of_one_buffer() -> None:
    """Views of a tensor share its version counter, which the later perturbation moves for the earlier one too."""
    buffer = torch.randn(10, dtype=torch.float64)
    first, second = nn.Parameter(buffer[:5]), nn.Parameter(buffer[5:])
    before = buffer.clone()
    optimizer = SAM([{"params": [first], "rho": 0.4}, {"params": [second]}], torch.optim.SGD, rho=0.1, lr=0.0)
    (first * second).sum().backward()
    optimizer.first_step(zero_grad=True)
    step = buffer - before
    (first * second).sum().backward()
    optimizer.second_step()
    expected = torch.cat([0.4 * before[5:], 0.1 * before[:5]]) / before.norm()
    torch.testing.assert_close(step, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(buffer, before)


def test_frozen_parameters_stay_whatever_their_gradient() -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    batch, *_ = small_batches(1)
    loss_of(model, batch).backward()
    model[0].weight.grad = torch.ones_like(frozen)  # of an earlier phase of training
    optimizer.first_step(zero_grad=True)
    assert torch.equal(model[0].weight, frozen)
    assert len(optimizer.last_info[0].names) == 3
    loss_of(model, batch).backward()
    optimizer.second_step()
    assert torch.equal(model[0].weight, frozen)


def test_parameters_with_a_gradient_in_one_pass_only() -> None:
    """The pass that lacks it may be either; davda54/sam leaves the one perturbed and fails on the other."""
    first, second, both = (nn.Parameter(torch.randn(4)) for _ in range(3))
    clean = [p.detach().clone() for p in (first, second, both)]
    optimizer = SAM([first, second, both], torch.optim.SGD, rho=0.5, lr=0.1)
    (first * both).sum().backward()
    optimizer.first_step(zero_grad=True)
    assert torch.equal(second, clean[1])
    moved = both.detach().clone()
    assert not torch.equal(moved, clean[2])
    (second * both).sum().backward()
    optimizer.second_step(zero_grad=True)
    assert torch.equal(first, clean[0])
    torch.testing.assert_close(second.detach(), clean[1] - 0.1 * moved)
    torch.testing.assert_close(both.detach(), clean[2] - 0.1 * clean[1])


def test_no_gradient_at_all() -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), **SGD)
    before = bits(model)
    with pytest.raises(ValueError, match="no parameter has a gradient: run backward"):
        optimizer.first_step()
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        optimizer.step(lambda: torch.zeros(()))
    model.requires_grad_(False)
    model[0].bias.grad = torch.ones(8)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        optimizer.first_step()
    assert same_bits(model, before)
    assert not optimizer.perturbed


def test_gradients_that_vanish_in_the_second_pass_take_no_step() -> None:
    model = small_model()
    before, (batch, *_) = bits(model), small_batches(1)
    optimizer = SAM(model.parameters(), **SGD)
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    optimizer.second_step()
    assert same_bits(model, before)


def test_calls_out_of_order() -> None:
    model = small_model()
    batch, *_ = small_batches(1)
    optimizer = SAM(model.parameters(), **SGD)
    loss_of(model, batch).backward()
    before = bits(model)
    with pytest.raises(RuntimeError, match="second_step comes after first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="step needs a closure, or first_step"):
        optimizer.step()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="first_step was called twice"):
        optimizer.first_step()
    optimizer.restore_()
    assert same_bits(model, before)
    optimizer.second_step()
    with pytest.raises(RuntimeError, match="second_step comes after first_step"):
        optimizer.second_step()


@pytest.mark.parametrize("failing_call", [1, 2])
def test_an_error_in_the_closure_restores(failing_call: int) -> None:
    model = small_model()
    batches = small_batches(2)
    optimizer = SAM(model.parameters(), rho=0.5, **SGD)
    before, calls = bits(model), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = loss_of(model, batches[0])
        loss.backward()
        if calls == failing_call:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same_bits(model, before)
    assert not optimizer.perturbed
    assert all(p.grad is None for p in model.parameters())  # not to be taken for those of the next first pass
    with pytest.raises(RuntimeError, match="step needs a closure"):
        optimizer.step()
    twin = small_model()
    train(twin, SAM(twin.parameters(), rho=0.5, **SGD), batches[1:])
    train(model, optimizer, batches[1:])
    assert same_bits(model, bits(twin))


def test_the_error_of_the_closure_is_the_one_that_is_raised() -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), **SGD)
    before, (batch, *_) = bits(model), small_batches(1)
    loss_of(model, batch).backward()

    def closure() -> None:
        torch.optim.SGD(model.parameters(), lr=1.0).zero_grad()
        with torch.no_grad():
            model[0].bias.add_(1)
        raise LookupError("no such batch")

    with pytest.raises(LookupError, match="no such batch"):
        optimizer.step(closure)
    assert same_bits(model, before)


def test_weights_modified_in_between_are_an_error() -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), **SGD)
    before, (batch, *_) = bits(model), small_batches(1)
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    with torch.no_grad():
        model[2].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified while perturbed"):
        optimizer.second_step()
    assert same_bits(model, before)


def test_gradients_that_are_not_finite_move_nothing_in_the_first_pass() -> None:
    model = small_model()
    before, (batch, *_) = bits(model), small_batches(1)
    optimizer = SAM(model.parameters(), **SGD)
    (loss_of(model, batch) * float("inf")).backward()
    optimizer.first_step(zero_grad=True)
    assert same_bits(model, before)
    assert optimizer.last_info[0].skipped
    optimizer.restore_()


def test_zero_gradients_move_nothing() -> None:
    model = small_model()
    before = bits(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for move in (optimizer.first_step, optimizer.second_step):
        (loss_of(model, small_batches(1)[0]) * 0).backward()
        move(zero_grad=True)
        assert same_bits(model, before)


def test_bfloat16_parameters() -> None:
    model = small_model(torch.bfloat16)
    (x, y), *_ = small_batches(1, torch.bfloat16)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.5)
    before = bits(model)
    F.cross_entropy(model(x).float(), y).backward()
    norm = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
    expected = [(p.double() + 0.2 * p.grad.double() / norm).bfloat16() for p in model.parameters()]
    optimizer.first_step(zero_grad=True)
    for p, w in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=2**-8, atol=0)
    optimizer.restore_()
    assert same_bits(model, before)
    optimizer.second_step()
    losses = train(model, optimizer, [(x, y)] * 20)
    assert losses[-1] < 0.9 * losses[0]


def test_both_passes_in_one_autocast_block() -> None:
    """Autocast keeps casts of the weights, which must not outlive the weights."""
    model = small_model()
    (x, y), *_ = small_batches(1)
    optimizer = SAM(model.parameters(), rho=2.0, **SGD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clean = model(x)
        F.cross_entropy(clean, y).backward()
        optimizer.first_step(zero_grad=True)
        perturbed = model(x)
        assert F.cross_entropy(perturbed, y) > F.cross_entropy(clean, y) + 0.1
        optimizer.restore_()
        assert torch.equal(model(x), clean)

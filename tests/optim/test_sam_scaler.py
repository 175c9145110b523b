"""SAM under a gradient scaler: scaled steps are unscaled ones; overflow in either pass changes no weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sam_loops import assert_same_state, bits, loss_of, same_bits, small_batches, small_model, train
from torch import Tensor, nn

from mmer_fast.optim import SAM

Factor = Callable[[int], float]  # of the loss in pass 0 or 1


def new_scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 1000, **options})


def new_optimizer(model: nn.Module, base: Any = torch.optim.AdamW, **options: Any) -> SAM:
    return SAM(model.parameters(), base, rho=0.1, **{"lr": 0.01, **options})


def scaled_step(
    model: nn.Module,
    optimizer: SAM,
    scaler: torch.amp.GradScaler,
    batch: tuple[Tensor, Tensor],
    factor: Factor = lambda _: 1.0,
    clip: float | None = None,
) -> None:
    scaler.scale(factor(0) * loss_of(model, batch)).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(factor(1) * loss_of(model, batch)).backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.second_step(zero_grad=True, scaler=scaler)
    scaler.update()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_scaled_steps_are_unscaled_ones(enabled: bool, options: dict[str, Any]) -> None:
    model, twin = small_model(), small_model()
    optimizer, scaler = new_optimizer(model, **options), new_scaler(enabled=enabled)
    batches = small_batches(8)
    for batch in batches:
        scaled_step(model, optimizer, scaler, batch)
    plain = new_optimizer(twin, **options)
    train(twin, plain, batches)
    assert same_bits(model, bits(twin))  # a power of two scales without rounding
    assert_same_state(optimizer, plain, rtol=0, atol=0)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("bad_pass", [0, 1])
def test_a_gradient_that_overflows_changes_no_weight(bad_pass: int, clip: float | None, scope: str) -> None:
    model, twin = small_model(), small_model()
    optimizer, scaler = new_optimizer(model, scope=scope), new_scaler()
    batches = small_batches(3)
    scaled_step(model, optimizer, scaler, batches[0], clip=clip)
    before, steps = bits(model), optimizer.state[model[0].weight]["step"].clone()
    with pytest.MonkeyPatch.context() as patch:
        # One entry of one gradient, as it happens: the others stay finite.
        passes: list[int] = []
        original = model[2].forward

        def forward(x: Tensor) -> Tensor:
            passes.append(len(passes))
            y = original(x)
            if passes[-1] == bad_pass:
                y.register_hook(lambda g: g.index_fill(0, torch.tensor([0]), float("inf")))
            return y

        patch.setattr(model[2], "forward", forward)
        scaled_step(model, optimizer, scaler, batches[1], clip=clip)
    assert passes == [0, 1]
    assert same_bits(model, before)
    assert torch.equal(optimizer.state[model[0].weight]["step"], steps)
    assert scaler.get_scale() == 2.0**9
    assert not optimizer.perturbed
    scaled_step(model, optimizer, scaler, batches[2], clip=clip)  # training goes on
    assert scaler.get_scale() == 2.0**9

    plain = new_optimizer(twin, scope=scope)
    for batch in (batches[0], batches[2]):
        scaled_step(twin, plain, new_scaler(), batch, clip=clip)
    assert same_bits(model, bits(twin))


def test_a_scale_that_is_far_too_high_comes_down() -> None:
    """float16 activations that overflow: a scale of 2^24 has to come down before the first step is taken."""
    model = small_model()
    optimizer, scaler = new_optimizer(model, torch.optim.SGD, lr=0.1), new_scaler(init_scale=2.0**24)
    (x, y), *_ = small_batches(1)

    def backward() -> float:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        return loss.item()

    losses = []
    for _ in range(30):
        losses.append(backward())
        optimizer.first_step(zero_grad=True)
        backward()
        optimizer.second_step(zero_grad=True, scaler=scaler)
        scaler.update()
    assert losses[1] == losses[0]
    assert scaler.get_scale() < 2.0**24
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_clipping_is_that_of_unscaled_gradients() -> None:
    model, twin = small_model(), small_model()
    optimizer, plain = (new_optimizer(m, torch.optim.SGD, lr=0.1) for m in (model, twin))
    scaler = new_scaler()
    for batch in small_batches(3):
        scaled_step(model, optimizer, scaler, batch, clip=0.05)
        loss_of(twin, batch).backward()
        plain.first_step(zero_grad=True)
        loss_of(twin, batch).backward()
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05) > 0.05
        plain.second_step(zero_grad=True)
    assert same_bits(model, bits(twin))


def test_inv_scale_is_for_the_report() -> None:
    infos = []
    for scale in (1.0, 2.0**10):
        model = small_model()
        optimizer = new_optimizer(model)
        (scale * loss_of(model, small_batches(1)[0])).backward()
        optimizer.first_step(inv_scale=1 / scale)
        infos.append((optimizer.last_info[0].norm.item(), optimizer.last_info[0].factor.item()))
        optimizer.restore_()
    assert infos[0] == infos[1]


def test_unscaling_both_passes_with_two_updates() -> None:
    """The way of older recipes: unscale_ and update() after the first pass too."""
    model, twin = small_model(), small_model()
    optimizer, scaler = new_optimizer(model), new_scaler()
    batches = small_batches(3)
    for batch in batches:
        scaler.scale(loss_of(model, batch)).backward()
        scaler.unscale_(optimizer)
        optimizer.first_step(zero_grad=True)
        scaler.update()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.unscale_(optimizer)
        optimizer.second_step(zero_grad=True, scaler=scaler)
        scaler.update()
    train(twin, new_optimizer(twin), batches)
    assert same_bits(model, bits(twin))

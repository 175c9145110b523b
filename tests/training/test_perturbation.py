"""Adversarial parameter perturbation: Eq. 14, and the exact way back."""

from __future__ import annotations

import math

import pytest
import torch
from small_training import MODEL, small_data, small_model
from torch import nn

from mmer_fast.training.perturbation import perturbation, perturbed_, perturbed_parameters


def tensors(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in ((3, 4), (5,), (2, 2, 2))]


def total_norm(values: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(x) ** 2 for value in values for x in value.flatten().tolist()))


@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_global_perturbation_is_eq_14(gamma: float) -> None:
    gradients = tensors()
    steps, norms = perturbation(gradients, gamma, "global")
    norm = total_norm(gradients)
    assert total_norm(steps) == pytest.approx(gamma, rel=1e-6)
    assert norms.tolist() == pytest.approx([norm], rel=1e-6)
    for step, gradient in zip(steps, gradients, strict=True):
        torch.testing.assert_close(step, gradient * (gamma / norm))


def test_tensor_scope_gives_every_tensor_the_norm() -> None:
    gradients = tensors()
    gradients[1] *= 1e-3
    steps, norms = perturbation(gradients, 0.7, "tensor")
    for step, gradient, norm in zip(steps, gradients, norms.tolist(), strict=True):
        assert total_norm([step]) == pytest.approx(0.7, rel=1e-6)
        assert norm == pytest.approx(total_norm([gradient]), rel=1e-6)


@pytest.mark.parametrize(("scale", "dtype"), [(1e-25, torch.float32), (1e25, torch.float32), (3e4, torch.float16)])
def test_the_norm_neither_overflows_nor_underflows(scale: float, dtype: torch.dtype) -> None:
    gradients = [g.clamp(-60000, 60000) if dtype == torch.float16 else g for g in tensors(scale)]
    steps, _ = perturbation([g.to(dtype) for g in gradients], 1.0, "global")
    assert all(step.dtype == dtype for step in steps)
    assert total_norm(steps) == pytest.approx(1.0, rel=2e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", ["global", "tensor"])
def test_a_norm_that_is_not_finite_perturbs_nothing(poison: float, norm: str) -> None:
    gradients = tensors()
    gradients[0][1, 2] = poison
    steps, norms = perturbation(gradients, 1.0, norm)
    assert (steps[0] == 0).all()
    assert not norms[0].isfinite()
    others = (total_norm(steps[1:2]), total_norm(steps[2:]))
    assert others == ((0.0, 0.0) if norm == "global" else pytest.approx((1.0, 1.0), rel=1e-6))


def test_a_zero_gradient_perturbs_nothing() -> None:
    steps, norms = perturbation([torch.zeros(3), torch.zeros(2, 2)], 1.0, "global")
    assert all((step == 0).all() for step in steps)
    assert norms.tolist() == [0.0]


def test_parameters_move_in_place_and_come_back_bit_for_bit() -> None:
    parameters = [nn.Parameter(t) for t in tensors(0.1)]
    before = [p.detach().clone() for p in parameters]
    addresses = [p.data_ptr() for p in parameters]
    gradients = tensors(7.0)
    steps, _ = perturbation(gradients, 0.3, "global")
    for _ in range(3):
        with perturbed_(parameters, gradients, 0.3):
            for parameter, start, step in zip(parameters, before, steps, strict=True):
                assert torch.equal(parameter, start + step)
        assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert addresses == [p.data_ptr() for p in parameters]


def test_parameters_come_back_after_an_exception() -> None:
    parameters = [nn.Parameter(t) for t in tensors(0.1)]
    before = [p.detach().clone() for p in parameters]

    def fail() -> None:
        with perturbed_(parameters, tensors(), 0.3):
            assert not torch.equal(parameters[0], before[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_selection_of_parameters() -> None:
    encoder = small_model(small_data(), MODEL).multimodal_encoder
    names = {id(p): name for name, p in encoder.named_parameters()}
    chosen = {
        which: {names[id(p)] for p in perturbed_parameters(encoder, which)}
        for which in ("projections", "attention", "feed_forward", "all")
    }
    assert chosen["attention"] == {f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value", "out")}
    assert chosen["feed_forward"] == {"blocks.0.feed_forward.0.weight", "blocks.0.feed_forward.3.weight"}
    assert chosen["projections"] == chosen["attention"] | chosen["feed_forward"]
    assert chosen["all"] == set(names.values())


def test_frozen_and_tied_parameters_count_once_or_not_at_all() -> None:
    encoder = small_model(small_data(), MODEL).multimodal_encoder
    attention = encoder.blocks[0].attention
    attention.key.weight = attention.query.weight
    attention.value.weight.requires_grad_(False)
    chosen = perturbed_parameters(encoder, "attention")
    assert [id(p) for p in chosen] == [id(attention.query.weight), id(attention.out.weight)]

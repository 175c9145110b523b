"""TAILOR's adversarial and orthogonal losses against their equations, written out in loops."""

from __future__ import annotations

import math

import pytest
import torch
from small_baselines import small_model
from torch import Tensor, nn

from mmer_fast.data import Batch
from mmer_fast.systems.baselines import TAILOR, ModalityDiscriminator, adversarial_loss, orthogonal_loss

PRESENT = torch.tensor([[True, True, True], [True, False, True], [False, False, False], [False, True, False]])


@pytest.fixture
def parts() -> tuple[nn.Module, Tensor, Tensor]:
    discriminator = ModalityDiscriminator(6, 3).double()
    return discriminator, *(torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))


def cross_entropy(logits: Tensor, target: int) -> float:
    return -(logits[target].item() - math.log(sum(math.exp(x) for x in logits.tolist())))


def test_adversarial_loss_against_its_equation(parts) -> None:
    discriminator, common, private = parts
    expected, count = 0.0, 0
    for i in range(4):
        for m in range(3):
            if PRESENT[i, m]:
                expected += cross_entropy(discriminator(common[i, m]), m)
                expected += cross_entropy(discriminator(private[i, m]), m)
                count += 1
    got = adversarial_loss(discriminator, common, private, PRESENT)
    assert got.item() == pytest.approx(expected / count, rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0])
def test_the_gradient_is_reversed_for_what_is_common_only(parts, scale: float) -> None:
    discriminator, common, private = parts
    leaves = [common, private, *discriminator.parameters()]
    got = torch.autograd.grad(adversarial_loss(discriminator, common, private, PRESENT, scale), leaves)

    target = torch.arange(3).repeat(4)[PRESENT.flatten()]
    pairs = [(discriminator(x).flatten(0, 1)[PRESENT.flatten()], target) for x in (common, private)]
    plain = torch.autograd.grad(sum(nn.functional.cross_entropy(*pair) for pair in pairs), leaves)
    expected = [-scale * plain[0], *plain[1:]]
    torch.testing.assert_close(list(got), expected, rtol=1e-10, atol=1e-14)
    assert not got[1][~PRESENT].any()  # what a sample lacks has no say


def test_nothing_present_costs_nothing(parts) -> None:
    discriminator, common, private = parts
    loss = adversarial_loss(discriminator, common, private, torch.zeros(4, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not common.grad.any()


def test_orthogonal_loss_against_its_equation() -> None:
    common, private = (torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(2))
    lengths = [5, 2, 0]
    for i, length in enumerate(lengths):
        common[i, length:] = private[i, length:] = 0
    expected = 0.0
    for i, length in enumerate(lengths):
        for a in range(4):
            for b in range(4):
                shared = sum(common[i, t, a].item() * private[i, t, b].item() for t in range(length))
                expected += shared**2 / max(length, 1)
    assert orthogonal_loss(common, private, torch.tensor(lengths)).item() == pytest.approx(expected / 3, rel=1e-12)


def test_orthogonal_representations_cost_nothing() -> None:
    common, private = torch.zeros(2, 4, 3, dtype=torch.float64), torch.zeros(2, 4, 3, dtype=torch.float64)
    common[:, :2], private[:, 2:] = 1.0, 1.0  # C and P have no unit in common: Cᵀ P = 0
    lengths = torch.tensor([4, 4])
    assert orthogonal_loss(common, private, lengths) == 0
    private[:, 0] = 1.0
    assert orthogonal_loss(common, private, lengths) > 0


def test_gradients_of_the_orthogonal_loss() -> None:
    common, private = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda c, p: orthogonal_loss(c, p, torch.tensor([3, 2])), (common, private))


def test_tailor_weighs_the_losses(batch: Batch) -> None:
    weights = {"adversarial_weight": 0.01, "orthogonal_weight": 5e-6, "common_weight": 0.5}
    objective = small_model(TAILOR, **weights).objective(batch)
    recognition, adversarial, orthogonal, common = objective.parts.tolist()
    assert min(objective.parts.tolist()) > 0
    expected = recognition + 0.01 * adversarial + 5e-6 * orthogonal + 0.5 * common
    assert objective.total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("left_out", ["adversarial", "orthogonal", "common"])
def test_a_loss_of_weight_0_is_left_out(left_out: str, batch: Batch) -> None:
    full = small_model(TAILOR).objective(batch)
    place = TAILOR.loss_names.index(left_out)
    objective = small_model(TAILOR, **{f"{left_out}_weight": 0.0}).objective(batch)
    assert objective.parts[place] == 0
    others = [i for i in range(4) if i != place]
    assert torch.equal(objective.parts[others], full.parts[others])


def test_the_discriminator_minimises_what_the_common_representation_maximises(batch: Batch) -> None:
    """With the other losses off, a step down the loss lowers the discriminator's, one along E_c raises it."""
    model = small_model(TAILOR, orthogonal_weight=0.0, common_weight=0.0, adversarial_weight=1.0)

    def modality_loss() -> Tensor:
        return model.objective(batch).parts[1]

    before = modality_loss()
    total = model.objective(batch).total - model.objective(batch).total.detach()
    total.backward()
    for module, rises in ((model.discriminator, False), (model.private, False), (model.common, True)):
        kept = [p.detach().clone() for p in module.parameters()]
        recognition = torch.autograd.grad(
            nn.functional.binary_cross_entropy_with_logits(model.logits(batch), batch.labels),
            list(module.parameters()),
            allow_unused=True,
        )
        with torch.no_grad():
            for p, other in zip(module.parameters(), recognition, strict=True):
                p -= 1e-3 * (p.grad - (0 if other is None else other))
        assert (modality_loss() > before) == rises
        with torch.no_grad():
            for p, old in zip(module.parameters(), kept, strict=True):
                p.copy_(old)

"""Algorithm 1 of RobMMR in its textbook form: three forward and three backward passes over the whole network.

    L_r   recognition, Eq. 2                       gradients of E^x, E^m, D
    L_m   with adversarial temporal masks, Eq. 5   gradients of E^x, E^m, D, and reversed ones of M^x
    L_p   with perturbed weights (of E^m), Eq. 13  gradients of E^x, E^m, D

The gradients accumulate to those of L_r + ρ L_m + σ L_p (Eq. 15). Nothing is shared between the passes but
what the algorithm shares: the masks come from the clean encodings of the first pass, and the target of L_p is
its prediction. This is the yardstick for faster forms of the step.

Line 12 of the algorithm does not name D among what receives ∇L_m. Eq. 4 and 15 minimise L_m over D as well, and so do
we.

**The target y* of L_p is detached.** Eq. 13 leaves it open and the published code detaches it. The clean
prediction is the reference that the perturbed network has to reproduce (as in virtual adversarial training);
with a gradient through it, L_p could fall by making the *clean* prediction worse, and it would be the
gradient of the clean weights taken while the perturbed ones are in place.

**The ablations of APP** (`TrainConfig.perturbation`) change the third pass alone. "random" perturbs the weights in
another direction. "fgsm" and "pgd" leave the weights alone and move the embeddings; L_p is then the recognition loss
of the moved embeddings, and what moves them is a constant of it. FGSM's gradient falls off the first backward pass;
PGD takes `pgd_steps` more passes, whose gradients of the parameters are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast.data import Batch
from mmer_fast.models import RobMMR
from mmer_fast.models.losses import asymmetric_loss, binary_cross_entropy
from mmer_fast.ops.kl_divergence import bernoulli_kl_with_logits, softmax_kl_with_logits
from mmer_fast.training.config import TrainConfig
from mmer_fast.training.data_parallel import averaging_group, mean, norm
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.perturbation import (
    Offsets,
    app_parameters,
    fgsm_offsets,
    pgd_offsets,
    random_directions,
)

Loss = Callable[[Tensor, Tensor], Tensor]
RECOGNITION_LOSSES: dict[str, Loss] = {"bce": binary_cross_entropy, "asymmetric": asymmetric_loss}
CONSISTENCY_LOSSES: dict[str, Loss] = {
    "bernoulli": bernoulli_kl_with_logits,
    "softmax": softmax_kl_with_logits,
}


LOSSES = ("recognition", "masked", "perturbed")
"""Names of L_r, L_m, L_p, in the order of `StepResult.losses`."""


@dataclass(frozen=True)
class StepResult:
    """What a step computed, detached and on the device.

    Attributes:
        losses: (3,) L_r, L_m, L_p, not weighted; 0 for a pass that was left out. With "fgsm" and "pgd" the third is
            L_r of the moved embeddings, here and in `gradient_ratio`. Of other models: the parts of their loss.
        logits: (B, K) of the clean pass.
        gradient_ratio: ‖∇L_p‖ / ‖∇(L_r + ρ L_m)‖ over all parameters, scalar; None when not measured.
    """

    losses: Tensor
    logits: Tensor
    gradient_ratio: Tensor | None


class Algorithm1:
    """One training step's losses and gradients.

    Args:
        model: the network; its parameters receive the gradients.
        config: ρ, σ, γ, losses, and what is perturbed how.
        world: the processes that share each batch; sharded (FSDP2) before, where it says so.

    Raises:
        ValueError: the model lacks what is to be perturbed (`check_pair`).
    """

    losses: tuple[str, ...] = LOSSES

    def __init__(self, model: RobMMR, config: TrainConfig, world: World = ALONE) -> None:
        self.model = model
        self.config = config
        self.recognition_loss = RECOGNITION_LOSSES[config.recognition_loss]
        self.consistency_loss = CONSISTENCY_LOSSES[config.consistency_loss]
        self.perturbed = app_parameters(model, config)
        self.world = world
        self.averaging_group = averaging_group(config, world)

    def accumulate_gradients(self, batch: Batch, *, measure_ratio: bool = False, weight: float = 1.0) -> StepResult:
        """Add the gradients of Eq. 15 to `.grad` of the parameters, which must be None or zero before.

        Args:
            batch: on the device of the model.
            measure_ratio: also measure ‖∇L_p‖ / ‖∇(L_r + ρ L_m)‖; copies the gradients once.
            weight: factor of the gradients, not of the losses in the result: `World.weight`.
        """
        config, model = self.config, self.model
        none = torch.zeros((), device=batch.labels.device)
        loss_m = loss_p = none
        ratio = None

        # Emotion recognition, lines 3-6. The graph stays where the masks will send gradients into the
        # encoders.
        offsets = self._zero_offsets(batch) if config.sigma > 0 and config.perturbation == "fgsm" else None
        clean = model(batch.features, batch.lengths, offsets=offsets)
        loss_r = self.recognition_loss(clean.logits, batch.labels)
        (weight * loss_r).backward(retain_graph=config.rho > 0 and model.config.reversal == "scores")
        g = self._copy_of_g()
        if offsets is not None:
            offsets = fgsm_offsets(offsets, config.embedding_radius)

        # Adversarial temporal masking, lines 7-12.
        if config.rho > 0:
            masks = model.temporal_masks(clean.encodings, self.world.group)
            masked = model(batch.features, batch.lengths, masks)
            loss_m = self.recognition_loss(masked.logits, batch.labels)
            (weight * config.rho * loss_m).backward()

        # Adversarial parameter perturbation, lines 13-17; or adversarial embeddings in its place.
        if config.sigma > 0:
            before = copy_gradients(model.parameters()) if measure_ratio else None
            if config.perturbation in ("gradient", "random"):
                direction = random_directions(self.perturbed) if config.perturbation == "random" else g
                with self._moved_along(direction):
                    noisy = model(batch.features, batch.lengths)
                    loss_p = self.consistency_loss(clean.logits.detach(), noisy.logits)
                    (weight * config.sigma * loss_p).backward()
            else:
                offsets = self._pgd_offsets(batch) if offsets is None else offsets
                loss_p = self._loss_at(offsets, batch)
                (weight * config.sigma * loss_p).backward()
            ratio = None if before is None else gradient_ratio(model.parameters(), before, self.world) / config.sigma

        losses = torch.stack([loss_r.detach(), loss_m.detach(), loss_p.detach()])
        return StepResult(losses, clean.logits.detach(), ratio)

    def _copies_g(self) -> bool:
        config = self.config
        along_g = config.sigma > 0 and config.perturbation == "gradient"
        return along_g and config.rho > 0 and config.app_gradient == "recognition"

    def _copy_of_g(self) -> list[Tensor | None] | None:
        """g of Eq. 14, where it has to be copied before L_m adds to it; None: lines 13-17 find it in `.grad`."""
        if not self._copies_g():
            return None
        return [None if p.grad is None else p.grad.clone() for p in self.perturbed]

    def _moved_along(self, direction: Sequence[Tensor | None] | None) -> AbstractContextManager[object]:
        """A block with the perturbed weights of Eq. 14.

        Args:
            direction: g of this process; None: it is in `.grad`.
        """
        return mf.perturbed(
            self.perturbed,
            self.config.gamma,
            scope=self.config.perturbation_norm,
            grads=direction,
            average_over=self.averaging_group,
        )

    def _zero_offsets(self, batch: Batch) -> dict[str, Tensor]:
        """Offsets of the embeddings that change nothing and receive a gradient."""
        zeros = self.model.zero_offsets(batch.features, batch.lengths)
        return {name: zeros_nd.requires_grad_() for name, zeros_nd in zeros.items()}

    def _pgd_offsets(self, batch: Batch) -> dict[str, Tensor]:
        return pgd_offsets(
            lambda offsets: self._loss_at(offsets, batch),
            self.model.zero_offsets(batch.features, batch.lengths),
            self.config.embedding_radius,
            self.config.pgd_steps,
        )

    def _loss_at(self, offsets: Offsets, batch: Batch) -> Tensor:
        """L_r with moved embeddings."""
        moved = self.model(batch.features, batch.lengths, offsets=offsets)
        return self.recognition_loss(moved.logits, batch.labels)


def copy_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the gradients; zeros for parameters that have received none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def gradient_ratio(parameters: Iterable[Tensor], before: list[Tensor], world: World = ALONE) -> Tensor:
    """‖after − before‖ / ‖before‖ over all gradients, those of the global batch."""
    added = [after - b for after, b in zip(copy_gradients(parameters), before, strict=True)]
    return norm(mean(added, world), world) / norm(mean(before, world), world)

"""Algorithm 1 of RobMMR with what its passes have in common computed once; the gradients are those of `Algorithm1`.

What is saved, and why no number changes:

    E^x, clean   APP of E^m or D leaves the unimodal encoders alone, so H^x serves L_r, the mask networks and L_p. The
                 gradients that arrive there from the three are summed, and the backward pass of E^x runs once, on the
                 sum.
    M^x          One launch of SOFT top-k for all modalities (`mmer_fast.models.masking`).
    layouts      Where the tokens are is found once, on the CPU where the batch comes from; no pass waits for a GPU.

In forward passes of E^x this is 2 instead of 3 (clean, masked), in backward passes 2 instead of 3, or of 4 where the
reversed gradient passes through the scores. The price is memory: what E^x stored in its clean pass is held until
the end of the step.

**With dropout the clean draw of E^x would be shared with L_p**, which changes the distribution of L_p: it no longer
contains the difference of two draws of E^x. So this is an option (`TrainConfig.share_dropout`). Without it L_p gets
a forward and a backward pass of E^x of its own, as in the textbook, and little is saved.

E^m and D run three times as in the textbook. Where g of Eq. 14 may contain L_m they could take the clean and the masked
samples as one batch; on a CPU that gains nothing and holds more memory.

**APP of E^x** (`TrainConfig.perturbed_modules`) gives L_p a forward and a backward pass of its own too, and where g of
Eq. 14 is the gradient of L_r alone, that has to go through the clean E^x by itself, before those of L_m and L_p arrive.

**FGSM and PGD** move the embeddings, below H^x: nothing of E^x can be shared with their pass. They are served by
`Algorithm1` itself.

With `TrainConfig.precision` "bfloat16" the networks run under autocast; mask networks, SOFT top-k and losses stay in
float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from mmer_fast.data import Batch
from mmer_fast.models.layout import BatchLayout
from mmer_fast.models.robmmr import Encodings
from mmer_fast.training.algorithm1 import Algorithm1, StepResult, copy_gradients, gradient_ratio
from mmer_fast.training.perturbation import random_directions


class FastStep(Algorithm1):
    """One training step's losses and gradients; arguments and results as for `Algorithm1`.

    From the same state of torch's generator the gradients are equal to those of `Algorithm1` up to rounding, unless
    dropout is shared or the precision is "bfloat16".
    """

    def accumulate_gradients(self, batch: Batch, *, measure_ratio: bool = False, weight: float = 1.0) -> StepResult:
        """As `Algorithm1.accumulate_gradients`; `measure_ratio` costs a second backward pass of the clean E^x."""
        if self.config.sigma > 0 and self.config.perturbation in ("fgsm", "pgd"):
            return super().accumulate_gradients(batch, measure_ratio=measure_ratio, weight=weight)
        return self._accumulate(batch, self.model.layout_of(batch), measure_ratio, weight)

    def _accumulate(self, batch: Batch, layout: BatchLayout, measure_ratio: bool, weight: float) -> StepResult:
        """The same of a batch whose layout is known, which may have fillers: they have no labels."""
        config, model = self.config, self.model
        loss_m = loss_p = torch.zeros((), device=batch.labels.device)
        before = ratio = None
        clean = _SharedEncodings(self._encode(batch, layout))

        # Emotion recognition, lines 3-6.
        logits = self._read(clean.encodings)
        loss_r = self.recognition_loss(logits, batch.labels)
        (weight * loss_r).backward()
        if self._copies_g() and config.perturbs_unimodal:
            clean.backward(retain_graph=model.config.reversal == "scores")
        g = self._copy_of_g()

        # Adversarial temporal masking, lines 7-12.
        if config.rho > 0:
            masked = self._encode(batch, layout, self._masks(clean.encodings))
            loss_m = self.recognition_loss(self._read(masked), batch.labels)
            (weight * config.rho * loss_m).backward()

        # Adversarial parameter perturbation, lines 13-17.
        shared = not config.perturbs_unimodal and (config.share_dropout or not self._draws_in_encoders())
        if config.sigma > 0:
            if measure_ratio or not shared:
                clean.backward(retain_graph=shared)
            if measure_ratio:
                before = copy_gradients(model.parameters())
            direction = random_directions(self.perturbed) if config.perturbation == "random" else g
            with self._moved_along(direction):
                noisy = self._read(clean.encodings if shared else self._encode(batch, layout))
                loss_p = self.consistency_loss(logits.detach(), noisy)
                (weight * config.sigma * loss_p).backward()
        clean.backward()
        if before is not None:
            ratio = gradient_ratio(model.parameters(), before, self.world) / config.sigma

        losses = torch.stack([loss_r.detach(), loss_m.detach(), loss_p.detach()])
        return StepResult(losses, logits.detach(), ratio)

    def _draws_in_encoders(self) -> bool:
        """Whether two forward passes of E^x differ."""
        config = self.model.config
        attends = config.encoder == "transformer"
        return self.model.training and (config.dropout > 0 or (attends and config.attention_dropout > 0))

    def _encode(self, batch: Batch, layout: BatchLayout, masks: dict[str, Tensor] | None = None) -> Encodings:
        with self._autocast(batch.labels.device):
            return self.model.encode(batch.features, batch.lengths, masks, layout=layout)

    def _masks(self, encodings: Encodings) -> dict[str, Tensor]:
        wide = replace(encodings, hidden={name: _wide(x_nd) for name, x_nd in encodings.hidden.items()})
        return self.model.temporal_masks(wide, self.world.group)

    def _read(self, encodings: Encodings) -> Tensor:
        """Logits (B, K) by E^m and D, without those of fillers."""
        device = next(iter(encodings.hidden.values())).device
        with self._autocast(device):
            logits = self.model.decode(*self.model.fuse(encodings))
        return _wide(logits[: len(logits) - encodings.layout.fillers])

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)


class _SharedEncodings:
    """Encodings cut off from the graph of E^x, where gradients gather until `backward` sends their sum down.

    `encodings` is what the passes above read.
    """

    def __init__(self, encodings: Encodings) -> None:
        self._below = encodings.hidden
        leaves = {name: x_nd.detach().requires_grad_(x_nd.requires_grad) for name, x_nd in self._below.items()}
        self.encodings = replace(encodings, hidden=leaves)

    def backward(self, *, retain_graph: bool = False) -> None:
        """The backward pass of E^x on what has arrived since the last call; nothing where nothing has."""
        arrived = [
            (x_nd, leaf_nd)
            for x_nd, leaf_nd in zip(self._below.values(), self.encodings.hidden.values(), strict=True)
            if leaf_nd.grad is not None
        ]
        if not arrived:
            return
        torch.autograd.backward(
            [x_nd for x_nd, _ in arrived], [leaf_nd.grad for _, leaf_nd in arrived], retain_graph=retain_graph
        )
        for _, leaf_nd in arrived:
            leaf_nd.grad = None


def _wide(x: Tensor) -> Tensor:
    """What autocast left in bfloat16, as float32."""
    return x.float() if x.dtype == torch.bfloat16 else x

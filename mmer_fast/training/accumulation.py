"""Gradient accumulation: the gradients of a batch from micro-batches that fit into memory one at a time.

A batch is cut in the order of its samples into consecutive micro-batches of `batch_size` / `accumulation` samples;
where the batch is short, as the last of an epoch may be, there are fewer of them and the last may be short too. All
losses are means over samples, so a micro-batch counts with its share of the samples. Over several processes it is the
micro-batches of the *global* batch that are divided among the ranks, so all ranks run the step equally often.

**APP perturbs each micro-batch along its own g** (Eq. 14), as m-sharpness does: with σ > 0 and `perturbation`
"gradient" the gradients are those of another, noisier perturbation than that of the whole batch. The largest cost of
`mask_normalizer` "max" is likewise that of the micro-batch. With "random", "fgsm", "pgd", random masks or dropout other
random numbers are drawn. Without any of these the gradients are those of the whole batch up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmer_fast.data import Batch
from mmer_fast.training.algorithm1 import StepResult
from mmer_fast.training.distributed import whole_batch
from mmer_fast.training.loop_config import LoopConfig
from mmer_fast.training.order import cut
from mmer_fast.training.steps import Step


def micro_batches_of(indices_b: Tensor, config: LoopConfig, group: str | None = None) -> Sequence[Tensor]:
    """A batch, positions (B,) in the split, in pieces for `LoopConfig.accumulation`; one of whole groups stays whole.

    Args:
        group: `Network.group`.
    """
    return cut(indices_b, config.batch_size // config.accumulation if group is None else len(indices_b))


def accumulate_gradients(
    algorithm: Step, batch: Batch, micro_batches: Sequence[Tensor], *, measure_ratio: bool = False
) -> StepResult:
    """Set `.grad` of the parameters, which must be None or zero before, to the gradients of Eq. 15 over micro-batches.

    Over several processes they are to be averaged over the ranks afterwards, unless they are sharded.

    Args:
        algorithm: the step; its gradients of one micro-batch at a time are in `.grad`, where it may look for g.
        batch: on the device of the model; this rank's part of each micro-batch (`World.part`), one after the other.
        micro_batches: at least one, the positions of its samples in the split. A single one is one run of the step.
        measure_ratio: as for `Algorithm1.accumulate_gradients`.

    Returns:
        Losses and logits of the whole batch, of all ranks. `gradient_ratio` is the mean of those of the micro-batches,
        weighted by samples.
    """
    world = algorithm.world
    parameters = list(algorithm.model.parameters())
    sums: list[Tensor | None] = [None] * len(parameters)
    results = []
    shares = [len(indices_b) / sum(map(len, micro_batches)) for indices_b in micro_batches]
    own = batch.split([len(world.part(indices_b)) for indices_b in micro_batches])
    for indices_b, part, share in zip(micro_batches, own, shares, strict=True):
        weight = world.weight(indices_b)
        result = algorithm.accumulate_gradients(part, measure_ratio=measure_ratio, weight=weight)
        losses, logits_bk = whole_batch(world, indices_b, result.losses, result.logits)
        results.append(replace(result, losses=losses, logits=logits_bk))
        if len(micro_batches) == 1:
            return results[0]
        _move_gradients(parameters, sums, share)
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad = total
    return _joined(results, shares)


def _move_gradients(parameters: Sequence[nn.Parameter], sums: list[Tensor | None], share: float) -> None:
    """Add `share` times each gradient to its sum, and leave None in its place."""
    for i, parameter in enumerate(parameters):
        if parameter.grad is None:
            continue
        total = sums[i]
        sums[i] = parameter.grad.mul_(share) if total is None else total.add_(parameter.grad, alpha=share)
        parameter.grad = None


def _joined(results: Sequence[StepResult], shares: Sequence[float]) -> StepResult:
    """The result of a batch from those of its micro-batches."""
    ratios = [result.gradient_ratio for result in results if result.gradient_ratio is not None]
    return StepResult(
        losses=_weighted_sum([result.losses for result in results], shares),
        logits=torch.cat([result.logits for result in results]),
        gradient_ratio=_weighted_sum(ratios, shares) if ratios else None,
    )


def _weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([value * weight for value, weight in zip(values, weights, strict=True)]).sum(dim=0)

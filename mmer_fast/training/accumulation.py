"""Gradient accumulation: the gradients of a batch from micro-batches that fit into memory one at a time.

A batch is cut in the order of its samples into consecutive micro-batches of `batch_size` / `accumulation` samples;
where the batch is short, as the last of an epoch may be, there are fewer of them and the last may be short too. All
losses are means over samples, so a micro-batch counts with its share of the samples.

**APP perturbs each micro-batch along its own g** (Eq. 14), as m-sharpness does: with σ > 0 and `perturbation`
"gradient" the gradients are those of another, noisier perturbation than that of the whole batch. With "random", "fgsm",
"pgd" or dropout other random numbers are drawn. Without any of these the gradients are those of the whole batch up to
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmer_fast.data import Batch
from mmer_fast.training.algorithm1 import Algorithm1, StepResult


def accumulate_gradients(
    algorithm: Algorithm1, batch: Batch, micro_batch: int, *, measure_ratio: bool = False, weight: float = 1.0
) -> StepResult:
    """Set `.grad` of the parameters, which must be None or zero before, to the gradients of Eq. 15 over micro-batches.

    Args:
        algorithm: the step; its gradients of one micro-batch at a time are in `.grad`, where it may look for g.
        batch: B samples, on the device of the model.
        micro_batch: samples in a micro-batch, at least 1; from B on the step runs once, on the batch itself.
        measure_ratio, weight: as for `Algorithm1.accumulate_gradients`.

    Returns:
        Losses and logits of the whole batch. `gradient_ratio` is the mean of those of the micro-batches, weighted by
        samples.
    """
    if len(batch) <= micro_batch:
        return algorithm.accumulate_gradients(batch, measure_ratio=measure_ratio, weight=weight)
    parameters = list(algorithm.model.parameters())
    sums: list[Tensor | None] = [None] * len(parameters)
    results, shares = [], []
    for part in batch.split(micro_batch):
        results.append(algorithm.accumulate_gradients(part, measure_ratio=measure_ratio, weight=weight))
        shares.append(len(part) / len(batch))
        _move_gradients(parameters, sums, shares[-1])
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

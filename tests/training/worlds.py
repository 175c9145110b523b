"""What the checks of distributed training share: worlds, parts of batches, the training of one process."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from small_training import MODEL, small_data, small_model
from torch import Tensor

from mmer_fast.data import Batch, SequenceDataset
from mmer_fast.models import RobMMR
from mmer_fast.training import StepResult, TrainConfig
from mmer_fast.training.data_parallel import average_gradients, gathered, prepare
from mmer_fast.training.distributed import World, padded_as_whole, whole_batch
from mmer_fast.training.steps import chosen_step

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
SPLIT = small_data().splits["train"]
SILENT = torch.tensor([9, 20, 28])


def world_of(rank: int, size: int, *, fsdp: bool = False) -> World:
    return World(rank, size, dist.group.WORLD, torch.device("cpu"), fsdp)


def double_model(**changes: Any) -> RobMMR:
    return small_model(small_data(), dataclasses.replace(MODEL, **{**NO_DROPOUT, **changes})).double()


def double(batch: Batch) -> Batch:
    features = {name: x.double() for name, x in batch.features.items()}
    return dataclasses.replace(batch, features=features, labels=batch.labels.double())


def samples(indices_b: Tensor) -> Batch:
    """In float64, some without their audio."""
    batch = SequenceDataset(SPLIT).__getitems__(indices_b.tolist())
    batch.lengths["audio"][torch.isin(batch.index, SILENT)] = 0
    return double(batch)


def grads_of(model: RobMMR) -> dict[str, Tensor]:
    return gathered({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def distributed_step(
    model: RobMMR, config: TrainConfig, world: World, indices_b: Tensor
) -> tuple[StepResult, dict[str, Tensor]]:
    """Result and gradients of a step on a global batch by the processes of `world`."""
    prepare(model, world)
    part = padded_as_whole(samples(world.part(indices_b)), SPLIT, indices_b)
    step = chosen_step(model, config, world)
    result = step.accumulate_gradients(part, measure_ratio=True, weight=world.weight(indices_b))
    average_gradients(model.parameters(), world)
    losses, logits_bk = whole_batch(world, indices_b, result.losses, result.logits)
    return dataclasses.replace(result, losses=losses, logits=logits_bk), grads_of(model)


def step_of_one(model: RobMMR, config: TrainConfig, indices_b: Tensor) -> tuple[StepResult, dict[str, Tensor]]:
    result = chosen_step(model, config).accumulate_gradients(samples(indices_b), measure_ratio=True)
    return result, grads_of(model)


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    largest = max(float(g.abs().max()) for g in want.values())
    for name, g in want.items():
        torch.testing.assert_close(got[name], g, rtol=1e-9, atol=1e-12 * largest, msg=lambda m, n=name: f"{n}: {m}")

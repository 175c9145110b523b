"""A step on parts of a batch: losses and gradients of one process with all of it, in float64."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from small_training import TRAIN, small_data
from worlds import (
    SPLIT,
    assert_same_gradients,
    distributed_step,
    double_model,
    grads_of,
    step_of_one,
    world_of,
)

from mmer_fast.data import SequenceDataset
from mmer_fast.perturbation import sharded
from mmer_fast.training import preset
from mmer_fast.training.data_parallel import clip_gradients, prepare
from mmer_fast.training.distributed import WorldError
from mmer_fast.training.evaluate import evaluate, predict_logits
from mmer_fast.training.perturbation import random_directions
from mmer_fast.training.steps import chosen_step

STEP = dataclasses.replace(TRAIN, gamma=0.5)
WHOLE, SINGLE = torch.arange(8), torch.tensor([5])
RAGGED = torch.tensor([3, 9, 1, 20, 4, 28, 7])  # the second rank has no audio at all
PADDING_COUNTS = {"padding_mask": False, "padded_length": None, "mask_normalizer": "max"}
CASES: list[tuple[dict[str, Any], dict[str, Any], torch.Tensor]] = [
    ({}, {"rho": 0.0, "sigma": 0.0}, RAGGED),
    ({}, {}, RAGGED),
    ({}, {}, SINGLE),  # all but one rank get no sample
    (
        {"reversal": "scores", "mask_normalizer": "max"},
        {"step": "textbook", "app_gradient": "total", "perturbation_norm": "tensor"},
        RAGGED,
    ),
    ({"reversal": "scores", "classifier": "shared", **PADDING_COUNTS}, {"perturbed": "all"}, RAGGED),
    ({}, {"perturbation": "fgsm"}, RAGGED),
    (
        {"encoder": "lstm", "standardize": True},
        {"perturbed_modules": "unimodal+multimodal", "perturbed": "all"},
        RAGGED,
    ),
    ({"fusion": "concatenation", "head": "linear"}, {"perturbed_modules": "unimodal"}, RAGGED),
]


def _equal_one_process(rank: int, size: int, *, fsdp: bool) -> None:
    world = world_of(rank, size, fsdp=fsdp)
    for model_changes, changes, indices_b in CASES:
        config = dataclasses.replace(STEP, **changes)
        model = double_model(**model_changes)
        expected, want = step_of_one(copy.deepcopy(model), config, indices_b)
        result, got = distributed_step(model, config, world, indices_b)
        assert_same_gradients(got, want)
        torch.testing.assert_close(result.losses, expected.losses, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-9, atol=1e-12)
        assert (result.gradient_ratio is None) == (expected.gradient_ratio is None)
        if expected.gradient_ratio is not None:
            torch.testing.assert_close(result.gradient_ratio, expected.gradient_ratio, rtol=1e-8, atol=0)


def replicated_equals_one_process(rank: int, size: int) -> None:
    _equal_one_process(rank, size, fsdp=False)


def sharded_equals_one_process(rank: int, size: int) -> None:
    _equal_one_process(rank, size, fsdp=True)


def parameters_come_from_the_first_rank(rank: int, size: int) -> None:
    want = copy.deepcopy(double_model())
    for fsdp in (False, True):
        model = double_model()
        if rank:
            torch.nn.init.zeros_(model.decoder.queries)
        prepare(model, world_of(rank, size, fsdp=fsdp))
        queries = model.decoder.queries
        assert torch.equal(queries.full_tensor() if fsdp else queries, want.decoder.queries)


def clipping_sees_all_shards(rank: int, size: int) -> None:
    for largest in (1e-3, 1e3):
        model = double_model()
        step_of_one(reference := copy.deepcopy(model), STEP, WHOLE)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), largest)
        world = world_of(rank, size, fsdp=True)
        distributed_step(model, STEP, world, WHOLE)
        clip_gradients(model.parameters(), largest, world)
        assert_same_gradients(grads_of(model), grads_of(reference))


def a_local_g_perturbs_each_copy_its_own_way(rank: int, size: int) -> None:
    """The mean of what each part gives alone, weighted by its samples."""
    config = dataclasses.replace(STEP, app_batch="local")
    want: dict[str, torch.Tensor] = {}
    for other in range(size):
        part = RAGGED[other::size]
        _, alone = step_of_one(double_model(), config, part)
        want = {name: want.get(name, 0) + g * len(part) / len(RAGGED) for name, g in alone.items()}
    _, got = distributed_step(double_model(), config, world_of(rank, size), RAGGED)
    assert_same_gradients(got, want)
    _, of_whole = step_of_one(double_model(), STEP, RAGGED)
    name = "multimodal_encoder.blocks.0.feed_forward.0.weight"
    assert (of_whole[name] - got[name]).norm() > 1e-4 * got[name].norm()


def random_directions_are_one_perturbation(rank: int, size: int) -> None:
    config = dataclasses.replace(STEP, perturbation="random")
    for fsdp in (False, True):
        torch.manual_seed(rank)
        world = world_of(rank, size, fsdp=fsdp)
        prepare(model := double_model(), world)
        step = chosen_step(model, config, world)
        clean = [sharded.local(p).clone() for p in step.perturbed]
        with step._moved_along(random_directions(step.perturbed)):
            moved = [sharded.local(p).clone() for p in step.perturbed]
        delta = torch.cat([(m - c).flatten() for m, c in zip(moved, clean, strict=True)])
        if not fsdp:
            first, *others = world.gather(delta)
            assert all(torch.equal(first, other) for other in others)
        squares = world.sum(delta.square().sum()) / (1 if fsdp else size)
        torch.testing.assert_close(squares.sqrt(), torch.tensor(config.gamma).double(), rtol=1e-9, atol=0)


def evaluation_in_turns_has_the_bits_of_one_process(rank: int, size: int) -> None:
    split = small_data().splits["test"]
    for fsdp in (False, True):
        model = double_model().float()
        want = predict_logits(copy.deepcopy(model), split, 7)
        metrics = evaluate(copy.deepcopy(model), split, batch_size=7)
        world = world_of(rank, size, fsdp=fsdp)
        prepare(model, world)
        assert torch.equal(predict_logits(model, split, 7, world), want)  # three batches: one rank repeats its last
        assert evaluate(model, split, batch_size=7, world=world) == metrics


def training_goes_on_after_evaluation(rank: int, size: int) -> None:
    """With the weights of now, not with those that were gathered for the evaluation."""
    world = world_of(rank, size, fsdp=True)
    prepare(model := double_model().float(), world)
    predict_logits(model, small_data().splits["valid"], 12, world)
    reference = double_model()
    with torch.no_grad():
        for p in (*model.parameters(), *reference.parameters()):
            p.mul_(1.5)
    _, want = step_of_one(reference, STEP, WHOLE)
    part = SequenceDataset(SPLIT).__getitems__(world.part(WHOLE).tolist())
    chosen_step(model, STEP, world).accumulate_gradients(part, weight=world.weight(WHOLE))
    for name, g in grads_of(model).items():
        assert (g - want[name]).norm() <= 1e-4 * want[name].norm() + 1e-6, name


def differing_ranks_are_refused(rank: int, size: int) -> None:
    world = world_of(rank, size)
    world.agree({"seed": 1, "data": "abc"})
    with pytest.raises(WorldError, match=r"same configuration and data \(seed: rank 0 has 0, rank 1 1\)"):
        world.agree({"seed": rank, "data": "abc"})


def presets_step_on_shards(rank: int, size: int) -> None:
    """Dropout, autocast and PGD take part as well; what they draw differs by rank."""
    for name, changes in (("paper", {"precision": "bfloat16"}), ("authors", {}), ("compact", {"perturbation": "pgd"})):
        config = dataclasses.replace(preset(name)[1], **changes)
        model = double_model(dropout=0.1).float()
        world = world_of(rank, size, fsdp=True)
        prepare(model, world)
        step = chosen_step(model, config, world)
        for _ in range(2):
            part = SequenceDataset(SPLIT).__getitems__(world.part(RAGGED).tolist())
            result = step.accumulate_gradients(part, weight=world.weight(RAGGED))
        assert result.losses.isfinite().all()
        assert all(g.isfinite().all() for g in grads_of(model).values())

"""DDP: whole parameters on every rank, whose gradients are averaged in backward, or not, or by `average_over`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed_models import (
    CHOICES,
    EXACT,
    RADIUS,
    assert_equals_one_process,
    assert_same,
    backward,
    grads_of,
    in_one_process,
    make,
    moved,
    on_all_ranks,
    restored,
    share,
    weights_of,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mmer_fast as mf


def mean_gradient(rank: int, world: int) -> None:
    for views in (False, True):
        model, x = make()
        wrapped = DistributedDataParallel(copy.deepcopy(model), gradient_as_bucket_view=views)
        assert_equals_one_process(model, x, wrapped, share(x, rank, world), choices=CHOICES[2:])


def local_gradient(rank: int, world: int) -> None:
    """Each rank at weights of its own; backward averages what it finds there (m-sharpness of Foret et al.)."""
    model, x = make()
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    alone = [in_one_process(model, part) for part in x.chunk(world)]
    with wrapped.no_sync():
        backward(wrapped, share(x, rank, world))
    with restored(wrapped), mf.perturbed(wrapped, RADIUS) as info:
        norm, new, _ = alone[rank]
        torch.testing.assert_close(info.norm, norm, **EXACT)
        assert_same(weights_of(wrapped), new)
        first, *others = on_all_ranks(wrapped.module.head.weight)
        assert not any(torch.equal(first, other) for other in others)
        wrapped.zero_grad()
        backward(wrapped, share(x, rank, world))
    for p in wrapped.parameters():
        first, *others = on_all_ranks(p)
        assert all(torch.equal(first, other) for other in others)
    mean = {name: sum(grads[name] for _, _, grads in alone) / world for name in alone[0][2]}
    assert_same(grads_of(wrapped), mean)


def average_over(rank: int, world: int) -> None:
    for scope, adaptive in CHOICES:
        model, x = make()
        wrapped = DistributedDataParallel(copy.deepcopy(model))
        norm, new, grads = in_one_process(model, x, scope, adaptive)
        with wrapped.no_sync():
            backward(wrapped, share(x, rank, world))
        before = grads_of(wrapped)
        options = {"scope": scope, "adaptive": adaptive, "average_over": dist.group.WORLD}
        with restored(wrapped), mf.perturbed(wrapped, RADIUS, **options) as info:
            torch.testing.assert_close(info.norm, norm, **EXACT)
            assert all(torch.equal(other, info.norm) for other in on_all_ranks(info.norm))
            assert_same(weights_of(wrapped), new)
            assert all(torch.equal(g, before[name]) for name, g in grads_of(wrapped).items())
            backward(wrapped, share(x, rank, world))
        backward(model, x)
        # DDP averages what it finds in .grad: the first gradients too, which stayed this rank's own.
        assert_same(grads_of(wrapped), {name: g + grads[name] for name, g in grads_of(model).items()})


def inner_pass_without_sync(rank: int, world: int) -> None:
    model, x = make()
    part = share(x, rank, world)
    _, _, grads = in_one_process(model, x)
    by_hand, later = (DistributedDataParallel(copy.deepcopy(model)) for _ in range(2))
    for wrapped in (by_hand, later):
        backward(wrapped, part)
        with mf.perturbed(wrapped, RADIUS), wrapped.no_sync():
            wrapped.zero_grad()
            backward(wrapped, part)
    for p in by_hand.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= world
    assert_same(grads_of(by_hand), grads)
    backward(later, part)
    backward(model, x)
    assert_same(grads_of(later), {name: g + grads[name] for name, g in grads_of(model).items()})


def compiled(rank: int, world: int) -> None:
    model, x = make()
    wrapped = torch.compile(DistributedDataParallel(copy.deepcopy(model)), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
        assert_equals_one_process(model, x, wrapped, share(x, rank, world), choices=CHOICES[:1])


def parameters_that_a_rank_did_not_use(rank: int, world: int) -> None:
    """A modality that is missing from the batch of one rank: the average is over all ranks all the same."""
    torch.manual_seed(2)
    model, x = nn.ModuleList(nn.Linear(5, 1).double() for _ in range(world + 1)), torch.randn(3, 5).double()
    for used in range(world):
        model[used](x).square().mean().backward()
    grads = {name: g / world for name, g in grads_of(model).items()}
    new, norm = moved(weights_of(model), grads)
    model.zero_grad()
    model[rank](x).square().mean().backward()
    with restored(model), mf.perturbed(model, RADIUS, average_over=dist.group.WORLD) as info:
        torch.testing.assert_close(info.norm, norm, **EXACT)
        assert_same(weights_of(model), new)
    assert len(grads_of(model)) == 2


def average_of_half_types(rank: int, world: int) -> None:
    """Sums beyond the range of float16, beside gradients of other types and strides."""
    torch.manual_seed(2)
    weights = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(2, 4).double(),
    }
    grads = {name: (rank + 1) * torch.full_like(w, 3.0) for name, w in weights.items()}
    grads["half"] = torch.full((5, 3), 40000.0).half().t()
    mean = {name: torch.full_like(w, 1.5 * (world + 1)).double() for name, w in weights.items()}
    mean["half"].fill_(40000)
    new, norm = moved({name: w.double() for name, w in weights.items()}, mean)
    params = {name: w.clone().requires_grad_() for name, w in weights.items()}
    with mf.perturbed(params.items(), RADIUS, grads=grads, average_over=dist.group.WORLD) as info:
        torch.testing.assert_close(info.norm, norm, **EXACT)
        for name, p in params.items():
            torch.testing.assert_close(p.detach(), new[name].to(p.dtype), rtol=1e-14 if name == "double" else 0, atol=0)


def average_not_finite_on_one_rank(rank: int, world: int) -> None:
    model, x = make()
    backward(model, x)
    if rank == 1:
        model.head.weight.grad[0, 2] = float("nan")
    clean = weights_of(model)
    with mf.perturbed(model, RADIUS, average_over=dist.group.WORLD) as info:
        assert info.skipped
        assert all(torch.equal(p, clean[name]) for name, p in model.named_parameters())


def average_over_refuses(rank: int, world: int) -> None:
    model, x = make()
    backward(model, x)
    alone = dist.new_group([0])
    with restored(model):
        for wrong in ("gloo", dist, alone if rank else 0):
            kind = ValueError if wrong is dist.GroupMember.NON_GROUP_MEMBER else TypeError
            with pytest.raises(kind, match="average_over must be a process group"):
                mf.perturb_(model, RADIUS, average_over=wrong)
        if rank == 0:
            norm, new, _ = in_one_process(make()[0], x)
            with mf.perturbed(model, RADIUS, average_over=alone) as info:
                torch.testing.assert_close(info.norm, norm, **EXACT)
                assert_same(weights_of(model), new)
    model.zero_grad()
    with pytest.raises(ValueError, match="has a gradient: run backward"):
        mf.perturb_(model, RADIUS, average_over=dist.group.WORLD)
    dist.barrier()

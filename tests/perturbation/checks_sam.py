"""`mmer_fast.optim.SAM` on distributed parameters: some steps are those of one process with the whole batch."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from distributed_models import (
    RADIUS,
    Named,
    assert_same,
    backward,
    grads_of,
    local,
    make,
    moved,
    shard,
    share,
    weights_of,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from mmer_fast.optim import SAM

SGD = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}
STEPS = 3


def _in_one_process(model: nn.Module, x: Tensor, adaptive: bool) -> Named:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD)
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(model, x)
        clean = weights_of(model)
        model.load_state_dict(moved(clean, grads_of(model), adaptive=adaptive)[0])
        optimizer.zero_grad()
        backward(model, x)
        model.load_state_dict(clean)
        optimizer.step()
    return weights_of(model)


def _sam(model: nn.Module, **options: object) -> SAM:
    return SAM([p for p in model.parameters() if p.requires_grad], torch.optim.SGD, RADIUS, **SGD, **options)


def _train(model: nn.Module, optimizer: SAM, x: Tensor) -> None:
    """The first step by hand, the others with a closure."""
    backward(model, x)
    optimizer.first_step(zero_grad=True)
    backward(model, x)
    optimizer.second_step(zero_grad=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).exp().mean()
        loss.backward()
        return loss.detach()

    for _ in range(STEPS - 1):
        optimizer.step(closure)


def over_fsdp(rank: int, world: int) -> None:
    for adaptive in (False, True):
        model, x = make()
        wrapped = shard(model)
        _train(wrapped, _sam(wrapped, adaptive=adaptive), share(x, rank, world))
        assert_same(weights_of(wrapped), _in_one_process(model, x, adaptive))


def over_ddp(rank: int, world: int) -> None:
    for adaptive in (False, True):
        model, x = make()
        wrapped = DistributedDataParallel(copy.deepcopy(model))
        _train(wrapped, _sam(wrapped, adaptive=adaptive), share(x, rank, world))
        assert_same(weights_of(wrapped), _in_one_process(model, x, adaptive))


def averages_itself(rank: int, world: int) -> None:
    model, x = make()
    want = _in_one_process(model, x, False)
    wrapped = DistributedDataParallel(model)
    optimizer = _sam(wrapped, average_over=dist.group.WORLD)
    for _ in range(STEPS):
        with wrapped.no_sync():
            backward(wrapped, share(x, rank, world))
        optimizer.first_step(zero_grad=True)
        backward(wrapped, share(x, rank, world))
        optimizer.second_step(zero_grad=True)
    assert_same(weights_of(wrapped), want)


def resumes_from_a_distributed_checkpoint(rank: int, world: int) -> None:
    """torch.distributed.checkpoint fills a new optimizer's state by a step with a learning rate of 0 first."""
    model, x = make()
    part = share(x, rank, world)
    saved = shard(model)
    optimizer = _sam(saved)
    _train(saved, optimizer, part)
    weights, state = copy.deepcopy((saved.state_dict(), get_optimizer_state_dict(saved, optimizer)))
    _train(saved, optimizer, part)
    for of_base in (False, True):
        resumed = shard(model)
        resumed.load_state_dict(weights)
        optimizer = _sam(resumed)
        set_optimizer_state_dict(resumed, optimizer.base_optimizer if of_base else optimizer, copy.deepcopy(state))
        _train(resumed, optimizer, part)
        for name, value in weights_of(resumed).items():
            assert torch.equal(local(value), local(weights_of(saved)[name])), name


def averages_what_a_rank_did_not_use(rank: int, world: int) -> None:
    torch.manual_seed(2)
    model, x = nn.ModuleList(nn.Linear(5, 1).double() for _ in range(world)), torch.randn(3, 5).double()
    for used in range(world):
        model[used](x).square().mean().backward()
    new, _ = moved(weights_of(model), {name: g / world for name, g in grads_of(model).items()})
    model.zero_grad()
    optimizer = _sam(model, average_over=dist.group.WORLD)
    model[rank](x).square().mean().backward()
    optimizer.first_step()
    assert_same(weights_of(model), new)
    optimizer.restore_()

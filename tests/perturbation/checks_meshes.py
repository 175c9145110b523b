"""DTensors on one mesh and on several, of one dimension and of two."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from distributed_models import (
    BITS,
    RADIUS,
    assert_equals_one_process,
    assert_same,
    backward,
    local,
    make,
    moved,
    on_all_ranks,
    restored,
    shard,
    share,
    weights_of,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mmer_fast as mf


def _in_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    model = copy.deepcopy(model)
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def _leaf(value: Tensor, mesh: DeviceMesh, *placements: object) -> Tensor:
    return distribute_tensor(value, mesh, placements).detach().requires_grad_()


def hsdp(rank: int, world: int) -> None:
    model, x = make()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    assert_equals_one_process(model, x, shard(model, mesh), share(x, rank, world))


def tensor_parallel(rank: int, world: int) -> None:
    model, x = make(hidden=8)
    wrapped = _in_parallel(model, init_device_mesh("cpu", (world,)))
    assert_equals_one_process(model, x, wrapped, x)


def converted_inside(rank: int, world: int) -> None:
    model, x = make(hidden=8)
    wrapped = _in_parallel(model, init_device_mesh("cpu", (world,)))
    backward(wrapped, x)
    weights = {name: local(p).bfloat16() for name, p in wrapped.named_parameters()}
    with pytest.raises(RuntimeError, match="modified while perturbed"), mf.perturbed(wrapped, RADIUS):
        wrapped.bfloat16()
    assert all(torch.equal(local(p), weights[name]) for name, p in wrapped.named_parameters())
    wrapped.zero_grad()
    backward(wrapped, x.bfloat16())
    with restored(wrapped), mf.perturbed(wrapped, RADIUS) as info:
        assert not info.skipped


def fsdp_of_tensor_parallel(rank: int, world: int) -> None:
    model, x = make(hidden=8)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    wrapped = shard(_in_parallel(model, mesh["tensor"]), mesh["data"])
    # Such shards say that they are none: `placement.is_shard()` would count them as copies of one another.
    assert not wrapped.blocks[0].up.weight.placements[0].is_replicate()
    assert_equals_one_process(model, x, wrapped, share(x, mesh.get_local_rank("data"), world // 2))


def not_finite_on_one_rank(rank: int, world: int) -> None:
    for bad in (float("inf"), float("nan")):
        model, x = make()
        wrapped = shard(model)
        backward(wrapped, share(x, rank, world))
        if rank == 1:
            local(wrapped.head.weight.grad)[0, 2] = bad
        with restored(wrapped):
            with mf.perturbed(wrapped, RADIUS) as info:
                assert info.skipped
                assert info.factor == 0
                assert_same(weights_of(wrapped), weights_of(model), BITS)
            with mf.perturbed(wrapped, RADIUS, scope="tensor") as info:
                assert info.skipped.tolist() == [name == "head.weight" for name in info.names]
                for name, value in weights_of(wrapped).items():
                    stays = name in ("head.weight", "scale")
                    assert torch.equal(value.full_tensor(), model.get_parameter(name)) == stays, name


def exception_on_one_rank(rank: int, world: int) -> None:
    """Restoring exchanges nothing, so the other ranks do not wait for the one that failed."""
    model, x = make()
    wrapped = shard(model)
    backward(wrapped, share(x, rank, world))
    with restored(wrapped):
        try:
            with mf.perturbed(wrapped, RADIUS):
                if rank == 1:
                    raise InterruptedError
        except InterruptedError:
            assert rank == 1
        dist.barrier()
    assert_equals_one_process(model, x, wrapped, share(x, rank, world), choices=(("global", False),))


def extreme_norms(rank: int, world: int) -> None:
    """Squares of neither would be representable, and each rank has gradients of another magnitude."""
    mesh = init_device_mesh("cpu", (world,))
    for size in (1e-170, 1e170):
        grad = torch.full((world, 3), size, dtype=torch.float64) * torch.logspace(0, 3, world).double()[:, None]
        w = _leaf(torch.zeros(world, 3, dtype=torch.float64), mesh, Shard(0))
        with mf.perturbed([w], RADIUS, grads=[distribute_tensor(grad, mesh, [Shard(0)])]) as info:
            torch.testing.assert_close(info.norm / size, (grad / size).norm(), rtol=1e-14, atol=0)
            torch.testing.assert_close(w.full_tensor().norm().item(), RADIUS, rtol=1e-14, atol=0)


def gradients_laid_out_otherwise(rank: int, world: int) -> None:
    """Partial sums are summed, other shards are moved, before the norm is taken."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(2)
    weight, parts = torch.randn(5, 3).double(), torch.randn(world, 5, 3).double()
    new, norm = moved({"0": weight}, {"0": parts.sum(0)})
    partial = DTensor.from_local(parts[rank], mesh, [Partial()])
    for gradient in (partial, distribute_tensor(parts.sum(0), mesh, [Shard(1)])):
        for placement in (Shard(0), Shard(1), Replicate()):
            w = _leaf(weight, mesh, placement)
            with mf.perturbed([w], RADIUS, grads=[gradient]) as info:
                torch.testing.assert_close(info.norm, norm, rtol=1e-12, atol=0)
                assert_same({"0": w}, new)


def several_meshes(rank: int, world: int) -> None:
    line = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (2, world // 2))
    torch.manual_seed(2)
    weights = {str(i): torch.randn(5, 3).double() for i in range(4)}
    grads = {str(i): torch.randn(5, 3).double() for i in range(4)}
    layouts = [(line, [Shard(0)]), (square, [Replicate(), Shard(1)]), (square, [Shard(0), Shard(0)]), None]
    for scope, adaptive in (("global", False), ("tensor", True), ("awp", False)):
        new, norm = moved(weights, grads, scope, adaptive)
        placed, slopes = {}, {}
        for (name, value), layout in zip(weights.items(), layouts, strict=True):
            placed[name] = _leaf(value, layout[0], *layout[1]) if layout else value.clone().requires_grad_()
            slopes[name] = distribute_tensor(grads[name], *layout) if layout else grads[name]
        with mf.perturbed(placed.items(), RADIUS, scope=scope, adaptive=adaptive, grads=slopes) as info:
            torch.testing.assert_close(info.norm, norm, rtol=1e-12, atol=0)
            assert all(torch.equal(other, info.norm) for other in on_all_ranks(info.norm))
            assert_same(placed, new)


def errors(rank: int, world: int) -> None:
    line, square = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    first = DeviceMesh("cpu", [0])
    value = torch.ones(4, 4)
    w, g = _leaf(value, line, Shard(0)), distribute_tensor(value, line, [Shard(0)])

    def refuses(error: type[Exception], text: str, parameter: Tensor, gradient: Tensor, **options: object) -> None:
        before = local(parameter).clone()
        with pytest.raises(error, match=text):
            mf.perturb_([("w", parameter)], RADIUS, grads=[gradient], **options)
        assert torch.equal(local(parameter), before)

    refuses(TypeError, "'w' must be a DTensor exactly where its parameter is one, got Tensor for DTensor", w, value)
    refuses(TypeError, "got DTensor for Parameter", nn.Parameter(value), g)
    refuses(ValueError, "'w' must be on the mesh of its parameter", w, distribute_tensor(value, square, [Shard(0)] * 2))
    refuses(ValueError, "average_over is for plain tensors", w, g, average_over=dist.group.WORLD)
    summed = DTensor.from_local(value, line, [Partial()]).requires_grad_()
    refuses(ValueError, "'w' must be sharded or replicated", summed, g)
    if rank > 0:
        elsewhere = _leaf(value, first, Shard(0))
        refuses(ValueError, "'w' must have this process in its mesh", elsewhere, elsewhere.detach())
    w.grad = g
    with pytest.raises(ValueError, match="average_over is for plain tensors"):
        mf.perturb_([w], RADIUS, average_over=dist.group.WORLD)
    dist.barrier()

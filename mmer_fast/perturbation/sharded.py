"""Parameters over several processes: what of them is here, and norms over all of it.

A DTensor (FSDP2, tensor parallelism) has a shard of a parameter on each rank. The step is local to a shard once the
norm is known, so only norms are exchanged: one number a parameter, gathered along each sharded dimension of the mesh
and combined without overflow, in the same order on every rank. So all ranks agree on what moves, bit for bit, and
restoring, which may follow an exception on one rank alone, exchanges nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmer_fast.ops.perturbation import run_grad_norm
from mmer_fast.ops.perturbation_reference import AWP, GLOBAL, TENSOR, norm
from mmer_fast.perturbation.selection import Named


def is_dtensor(tensor: Tensor) -> bool:
    return any_dtensor((tensor,))


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there are none
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def local(tensor: Tensor) -> Tensor:
    """The values that this rank has; of a plain tensor itself. In-place changes of them change the tensor."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        values = tensor.to_local()  # type: ignore[attr-defined]
    return values.wait() if hasattr(values, "wait") else values


def refuse_flat(named: Named) -> None:
    """
    Raises:
        TypeError: naming the first parameter that the older FullyShardedDataParallel has flattened: what is here of it
            looks like a whole tensor, so that each rank would take a norm of its own.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for name, parameter in named:
        if getattr(parameter, "_fsdp_flattened", False):
            raise TypeError(
                f"parameter {name!r} must be a DTensor to be sharded, got one of FullyShardedDataParallel (FSDP1); "
                "use torch.distributed.fsdp.fully_shard"
            )


def drop_gathered(module: nn.Module) -> None:
    """Makes FSDP2 gather the weights anew in its next forward pass, and show the sharded parameters until then.

    It keeps them gathered after a forward pass without a backward pass (those of the root module) and with
    ``set_reshard_after_backward(False)``: the weights from before a perturbation inside, or the other way round.

    After an exception in the middle of a pass it wants ``reset_iter_state()`` of the root, which drops them too.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is wrapped
    if fsdp is None:
        return
    for part in module.modules():
        if isinstance(part, fsdp.FSDPModule):
            part.reshard()


def aligned_gradient(name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, laid out over the mesh as its parameter is; partial sums are summed.

    Raises:
        TypeError: one of them is a DTensor and the other is not.
        ValueError: a parameter that consists of partial sums, or a mesh that does not fit.
    """
    if is_dtensor(parameter) != is_dtensor(gradient):
        raise TypeError(
            f"the gradient of {name!r} must be a DTensor exactly where its parameter is one, got "
            f"{type(gradient).__name__} for {type(parameter).__name__}"
        )
    if not is_dtensor(parameter):
        return gradient
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    if mesh.get_coordinate() is None:
        raise ValueError(f"parameter {name!r} must have this process in its mesh, got {mesh}")
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"parameter {name!r} must be sharded or replicated, got {placements}")
    if gradient.device_mesh != mesh:  # type: ignore[attr-defined]
        raise ValueError(
            f"the gradient of {name!r} must be on the mesh of its parameter ({mesh}), got {gradient.device_mesh}"  # type: ignore[attr-defined]
        )
    if gradient.placements == placements:  # type: ignore[attr-defined]
        return gradient
    with torch.no_grad():
        return gradient.redistribute(mesh, placements)  # type: ignore[attr-defined]


def like(parameter: Tensor, values: Tensor) -> Tensor:
    """`values` of this rank as a tensor of the kind of `parameter`."""
    if not is_dtensor(parameter):
        return values
    return sys.modules["torch.distributed.tensor"].DTensor.from_local(
        values,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def norms_over_mesh(
    backend: str, parameters: Sequence[Tensor], values: list[Tensor], grads: list[Tensor], scope: int, adaptive: bool
) -> tuple[Tensor, Tensor | None]:
    """Norms of the groups over all ranks, as `perturb_` takes them; those of the weights with scope awp, else None.

    Args:
        parameters: as the module has them, for their meshes.
        values, grads: what this rank has of each.
    """
    weights = values if adaptive or scope == AWP else []
    own, own_weights = run_grad_norm(backend, grads, weights, AWP if scope == AWP else TENSOR, adaptive)
    # Columns, not indices: a list of indices would have to go to the device first, which waits for it.
    columns = list((torch.stack([own, own_weights]) if scope == AWP else own[None]).unbind(1))
    meshes: dict[Any, list[int]] = {}
    for i, parameter in enumerate(parameters):
        if is_dtensor(parameter):
            meshes.setdefault(parameter.device_mesh, []).append(i)  # type: ignore[attr-defined]
    for mesh, members in meshes.items():
        for dim in range(mesh.ndim):
            # Not is_shard(), which is false of the strided shards that FSDP2 makes of tensor-parallel ones.
            split = [i for i in members if not parameters[i].placements[dim].is_replicate()]  # type: ignore[attr-defined]
            if split:
                combined = _combined(torch.stack([columns[i] for i in split]), mesh.get_group(dim))
                for i, column in zip(split, combined.unbind(0), strict=True):
                    columns[i] = column
    rows = torch.stack(columns, 1)
    norms = norm(rows[0]).reshape(1) if scope == GLOBAL else rows[0].contiguous()
    return norms, rows[1].contiguous() if scope == AWP else None


def _combined(rows: Tensor, group: Any) -> Tensor:
    """|(x of each rank)|_2, entry by entry, without overflow or underflow."""
    import torch.distributed as dist

    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows, group=group)
    return norm(torch.stack(parts), dim=0)


def zeros_where_missing(named: Named, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Zero gradients for those that require one and have none here: other ranks may, and an average is one of all."""
    if all(gradient is None for gradient in grads):
        return list(grads)
    return [
        p.detach().new_zeros(()).expand(p.shape) if gradient is None and p.requires_grad else gradient
        for (_, p), gradient in zip(named, grads, strict=True)
    ]


def averaged(grads: Sequence[Tensor], group: Any) -> list[Tensor]:
    """The mean of the gradients over the ranks of a process group, as new tensors; one exchange a dtype.

    Half types are summed, and come back, in float32.

    Raises:
        TypeError, ValueError: something else than a process group that this process is in.
    """
    import torch.distributed as dist

    if dist.is_available() and not isinstance(group, Tensor) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("average_over must be a process group that this process is in, got one of others")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"average_over must be a process group, got {type(group).__name__}")
    result: list[Tensor | None] = [None] * len(grads)
    for dtype in dict.fromkeys(g.dtype for g in grads):
        places = [i for i, g in enumerate(grads) if g.dtype == dtype]
        flat = torch.cat([grads[i].detach().reshape(-1) for i in places])
        flat = flat.float() if flat.element_size() < 4 else flat
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for i, piece in zip(places, flat.split([grads[i].numel() for i in places]), strict=True):
            result[i] = piece.view(grads[i].shape)
    return [g for g in result if g is not None]

"""A model over several processes: replicated, with gradients averaged once a step, or sharded by FSDP2.

**Replicated, without DistributedDataParallel.** DDP averages in hooks of *one* backward pass that follows a call of its
own `forward`. Algorithm 1 has three and more, through `encode`, `fuse` and `decode`, with the reduced g of Eq. 14
needed in between. Under `no_sync` the last of them would have to reach every parameter; it reaches E^m and D only (the
mask networks never, E^x in a pass of its own), and DDP leaves the gradients of parameters that its last pass did not
use as they are, on every rank its own. So the reduction is one here: a flat buffer with all gradients of the step
(`average_gradients`), and before the third pass one with g (`averaging_group`, which `mf.perturbed` averages over).

**Sharded.** `fully_shard` hooks into `forward`, so it is applied to the submodules that `RobMMR` calls, and to the
blocks inside; never to the whole, whose `encode`, `fuse` and `decode` are called past its forward. Each backward pass
leaves reduced gradients, which are DTensors. All are resharded after forward: parameters that stayed gathered would be
those of before a perturbation or an optimiser step.

A checkpoint has the form of one process: whole tensors, written by rank 0. So a run goes on with another number of
processes, or sharded otherwise; with the same number, to the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmer_fast.models import RobMMR
from mmer_fast.models.network import Network
from mmer_fast.perturbation import sharded
from mmer_fast.training.config import TrainConfig
from mmer_fast.training.distributed import World


def prepare(model: Network, world: World) -> None:
    """Give every rank the parameters of rank 0, and shard them under FSDP; before an optimiser sees them."""
    if world.group is None:
        return
    _broadcast([*model.parameters(), *model.buffers()], world)
    if world.fsdp:
        assert isinstance(model, RobMMR)
        _shard(model, world)


def _broadcast(tensors: Sequence[Tensor], world: World) -> None:
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chosen = [t.detach() for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in chosen])
        dist.broadcast(flat, 0, group=world.group)
        for t, piece in zip(chosen, flat.split([t.numel() for t in chosen]), strict=True):
            t.copy_(piece.view_as(t))


def _shard(model: RobMMR, world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    stacks = [*model.unimodal_encoders.values(), model.multimodal_encoder, model.decoder]
    called = [*stacks, *model.embeddings.values(), *model.mask_networks.values(), model.classifier]
    blocks = [block for stack in stacks for block in getattr(stack, "blocks", ())]
    # Their outputs may be views, none of which is written to.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in (*blocks, *called):
        if module is not None:  # a model may do without
            fully_shard(module, mesh=mesh, reshard_after_forward=True)


def averaging_group(config: TrainConfig, world: World) -> Any:
    """The process group over which `mf.perturbed` averages g of Eq. 14; None where it takes g as it is."""
    return None if world.fsdp or config.app_batch == "local" else world.group


def average_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Replace the gradients of replicated parameters by their mean over the ranks; those of sharded ones have it."""
    owners = [p for p in parameters if p.grad is not None]
    for p, gradient in zip(owners, mean([p.grad for p in owners if p.grad is not None], world), strict=True):
        p.grad = gradient


def mean(gradients: list[Tensor], world: World) -> list[Tensor]:
    """The mean over the ranks of gradients that are not reduced yet; under FSDP they are."""
    return gradients if world.group is None or world.fsdp else sharded.averaged(gradients, world.group)


def norm(tensors: Sequence[Tensor], world: World) -> Tensor:
    """‖tensors‖ over all of them, and over the shards of all ranks; scalar."""
    own = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([sharded.local(t) for t in tensors], 2)))
    return torch.linalg.vector_norm(torch.stack(world.gather(own))) if world.fsdp else own


def clip_gradients(parameters: Iterable[Tensor], largest: float, world: World) -> None:
    """Scale the gradients so that their norm is at most `largest`, as `torch.nn.utils.clip_grad_norm_`."""
    if not world.fsdp:
        torch.nn.utils.clip_grad_norm_(parameters, largest)
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    factor = (largest / (norm(gradients, world) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([sharded.local(gradient) for gradient in gradients], factor)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, whole where they were sharded. Every rank has to call it."""
    return {name: t.full_tensor() if sharded.is_dtensor(t) else t for name, t in tensors.items()}  # type: ignore[attr-defined]


def scattered(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What this rank has of whole tensors; the inverse of `gathered`.

    Args:
        tensors: `<name>` or `<name>/<anything>` of parameters of `model`, whose sharding those of its shape get.
    """
    parameters = dict(model.named_parameters())
    return {name: _as_sharded(t, parameters.get(name.split("/")[0])) for name, t in tensors.items()}


def _as_sharded(whole: Tensor, parameter: Tensor | None) -> Tensor:
    if parameter is None or not sharded.is_dtensor(parameter) or parameter.shape != whole.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)

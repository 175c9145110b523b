"""A small transformer, what one process makes of it by the formula, and comparisons with what several make of it.

The sizes are odd, so that shards are uneven and some ranks have nothing of some parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import mmer_fast as mf

RADIUS = 0.3
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SINGLE = {"rtol": 2e-5, "atol": 2e-6}  # float32: sums in another order
BITS = {"rtol": 0.0, "atol": 0.0}
CHOICES = (("global", False), ("tensor", False), ("awp", False), ("global", True))
Named = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gate = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x_btd: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_btd)).chunk(3, -1)
        x_btd = x_btd + self.gate * self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x_btd + self.down(torch.tanh(self.up(self.norm2(x_btd))))


class Transformer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Block(6, hidden) for _ in range(2))
        self.head = nn.Linear(6, 3, bias=False)
        self.scale = nn.Parameter(torch.full((3,), 0.9), requires_grad=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        x_btd = self.embed(x_btd)
        for block in self.blocks:
            x_btd = block(x_btd)
        return self.head(x_btd).mean(1) * self.scale


def make(dtype: torch.dtype = torch.float64, hidden: int = 7) -> tuple[Transformer, Tensor]:
    """A model and a whole batch, the same on every rank."""
    torch.manual_seed(1)
    return Transformer(hidden).to(dtype), torch.randn(8, 4, 5, dtype=dtype)


def share(x: Tensor, rank: int, world: int) -> Tensor:
    return x.chunk(world)[rank]


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).exp().mean().backward()


def shard(model: nn.Module, mesh: DeviceMesh | None = None, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """FSDP2 of a copy, as torch's tutorial does it: each block, then the rest."""
    model = copy.deepcopy(model)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return model


def weights_of(model: nn.Module) -> Named:
    return {_plain(name): p.detach().clone() for name, p in model.named_parameters()}


def grads_of(model: nn.Module) -> Named:
    return {_plain(name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _plain(name: str) -> str:
    return name.replace("module.", "").replace("_orig_mod.", "")


def local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def moved(weights: Named, grads: Named, scope: str = "global", adaptive: bool = False) -> tuple[Named, Tensor]:
    """(w', norms): `weights` in one process, perturbed by the formulas of `mmer_fast.ops.perturb_`."""
    norms = {name: (weights[name] * g if adaptive else g).double().norm() for name, g in grads.items()}
    norm = torch.stack(list(norms.values())).norm()
    new = dict(weights)
    for name, g in grads.items():
        w = weights[name]
        reach = RADIUS * (w.norm() if scope == "awp" else 1)
        new[name] = w + reach * (w * w * g if adaptive else g) / (norm if scope == "global" else norms[name])
    return new, norm if scope == "global" else torch.stack(list(norms.values()))


def in_one_process(
    model: nn.Module, x: Tensor, scope: str = "global", adaptive: bool = False
) -> tuple[Tensor, Named, Named]:
    """Norms, perturbed weights and the gradients there; `model` is left alone."""
    model = copy.deepcopy(model)
    backward(model, x)
    new, norm = moved(weights_of(model), grads_of(model), scope, adaptive)
    model.load_state_dict(new)
    model.zero_grad()
    backward(model, x)
    return norm, new, grads_of(model)


def assert_same(got: Mapping[str, Tensor], want: Named, tolerance: Mapping[str, float] = EXACT) -> None:
    """That what this rank has of `got`, plain tensors or DTensors, is its part of `want`, whole tensors."""
    assert got.keys() == want.keys()
    for name, whole in want.items():
        value = got[name].detach()
        if isinstance(value, DTensor):
            if all(p.is_shard() or p.is_replicate() for p in value.placements):
                whole = distribute_tensor(whole, value.device_mesh, value.placements, src_data_rank=None).to_local()
                value = value.to_local()
            else:  # strided shards, which distribute_tensor does not make
                value = value.full_tensor()
        torch.testing.assert_close(value, whole, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def on_all_ranks(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return parts


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """That the parameters of this rank have their old bits, in their old memory, in the end."""
    before = [(p, local(p).clone(), local(p).data_ptr()) for p in model.parameters()]
    yield
    for p, (same, bits, pointer) in zip(model.parameters(), before, strict=True):
        assert p is same
        assert local(p).data_ptr() == pointer
        assert torch.equal(local(p), bits)


def assert_equals_one_process(
    model: nn.Module,
    x: Tensor,
    wrapped: nn.Module,
    part: Tensor,
    tolerance: Mapping[str, float] = EXACT,
    choices: tuple[tuple[str, bool], ...] = CHOICES,
) -> None:
    """That `wrapped`, the distributed `model` whose share of the batch is `part`, does what one process does."""
    for scope, adaptive in choices:
        norm, new, grads = in_one_process(model, x, scope, adaptive)
        wrapped.zero_grad()
        backward(wrapped, part)
        with restored(wrapped), mf.perturbed(wrapped, RADIUS, scope=scope, adaptive=adaptive) as info:
            assert not info.skipped.any()
            torch.testing.assert_close(info.norm, norm, **tolerance)
            assert all(torch.equal(other, info.norm) for other in on_all_ranks(info.norm))
            assert_same(weights_of(wrapped), new, tolerance)
            wrapped.zero_grad()
            backward(wrapped, part)
        assert_same(grads_of(wrapped), grads, tolerance)

"""FSDP2: shards on every rank, gathered for a forward pass and gone after it."""

from __future__ import annotations

import warnings

import pytest
import torch
from distributed_models import (
    BITS,
    CHOICES,
    EXACT,
    RADIUS,
    SINGLE,
    assert_equals_one_process,
    assert_same,
    backward,
    grads_of,
    in_one_process,
    local,
    make,
    restored,
    shard,
    share,
    weights_of,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import mmer_fast as mf


def equals_one_process(rank: int, world: int) -> None:
    model, x = make()
    wrapped = shard(model)
    if rank == world - 1:
        assert any(local(p).numel() == 0 for p in wrapped.parameters())
    assert_equals_one_process(model, x, wrapped, share(x, rank, world))


def float32(rank: int, world: int) -> None:
    model, x = make(torch.float32)
    assert_equals_one_process(model, x, shard(model), share(x, rank, world), SINGLE, CHOICES[2:])


def bfloat16_compute(rank: int, world: int) -> None:
    model, x = make(torch.float32)
    wrapped = shard(model, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    part = share(x, rank, world)
    backward(wrapped, part)
    clean = weights_of(wrapped)
    with restored(wrapped), mf.perturbed(wrapped, RADIUS) as info:
        steps = [(p - clean[name]).full_tensor() for name, p in wrapped.named_parameters()]
        length = torch.stack([step.double().norm() for step in steps]).norm()
        torch.testing.assert_close(length.item(), RADIUS, rtol=1e-6, atol=0)
        assert info.norm > 0
        wrapped.zero_grad()
        backward(wrapped, part)
    assert all(p.grad.full_tensor().isfinite().all() for p in wrapped.parameters() if p.requires_grad)


def compiled(rank: int, world: int) -> None:
    model, x = make()
    wrapped = torch.compile(shard(model), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
        assert_equals_one_process(model, x, wrapped, share(x, rank, world), choices=CHOICES[:1])


def state_dicts_are_clean(rank: int, world: int) -> None:
    model, x = make()
    wrapped = shard(model)
    clean = weights_of(model)
    backward(wrapped, share(x, rank, world))
    with mf.perturbed(wrapped, RADIUS):
        state = wrapped.state_dict()
        assert all(isinstance(value, DTensor) for value in state.values())
        assert_same(state, clean, BITS)
        assert_same(get_model_state_dict(wrapped), clean, BITS)
        whole = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
        assert_same(whole, clean, BITS)
        wrapped(share(x, rank, world))  # leaves the root's weights gathered
        assert_same(wrapped.state_dict(), clean, BITS)
    assert_same(wrapped.state_dict(), clean, BITS)


def gathers_anew_at_both_ends(rank: int, world: int) -> None:
    """The root module keeps its weights gathered after a forward pass without a backward pass."""
    model, x = make()
    wrapped = shard(model)
    backward(wrapped, share(x, rank, world))
    names = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    with torch.no_grad():
        clean = wrapped(x)
        assert not all(isinstance(p, DTensor) for p in wrapped.parameters())
        with mf.perturbed(wrapped, RADIUS) as info:
            assert list(info.names) == names
            inside = wrapped(x)
            for name, value in weights_of(wrapped).items():
                model.get_parameter(name).copy_(value.full_tensor() if isinstance(value, DTensor) else value)
            torch.testing.assert_close(inside, model(x), rtol=1e-12, atol=1e-12)
            assert not torch.allclose(inside, clean)
        assert torch.equal(wrapped(x), clean)


def kept_gathered_after_backward(rank: int, world: int) -> None:
    model, x = make()
    norm, new, grads = in_one_process(model, x)
    wrapped = shard(model)
    wrapped.set_reshard_after_backward(False)
    backward(wrapped, share(x, rank, world))
    assert not any(isinstance(p, DTensor) for p in wrapped.parameters())
    with mf.perturbed(wrapped, RADIUS) as info:
        torch.testing.assert_close(info.norm, norm, **EXACT)
        assert_same(weights_of(wrapped), new)
        wrapped.zero_grad()
        backward(wrapped, share(x, rank, world))
    assert_same(weights_of(wrapped), weights_of(model), BITS)
    assert_same(grads_of(wrapped), grads)


def converted_later(rank: int, world: int) -> None:
    model, x = make()
    wrapped = shard(model)
    backward(wrapped, share(x, rank, world))
    weights = {name: local(p).bfloat16() for name, p in wrapped.named_parameters()}
    with mf.perturbed(wrapped, RADIUS):
        pass
    wrapped.zero_grad()
    wrapped.bfloat16()
    assert all(torch.equal(local(p), weights[name]) for name, p in wrapped.named_parameters())


def exception_in_forward(rank: int, world: int) -> None:
    model, x = make()
    wrapped = shard(model)
    if not hasattr(wrapped, "reset_iter_state"):
        return  # this torch cannot go on after an exception in a forward pass
    backward(wrapped, share(x, rank, world))
    with torch.no_grad():
        clean = wrapped(x)

    def fail(*_: object) -> None:
        raise KeyError("out of data")

    hook = wrapped.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="out of data"), mf.perturbed(wrapped, RADIUS):
        wrapped(x)
    hook.remove()
    wrapped.reset_iter_state()
    assert_same(weights_of(wrapped), weights_of(model), BITS)
    with torch.no_grad():
        assert torch.equal(wrapped(x), clean)


def flat_parameters_are_refused(rank: int, world: int) -> None:
    for original in (False, True):
        model, x = make()
        model.scale.requires_grad_()
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
        backward(wrapped, share(x, rank, world))
        with restored(wrapped), pytest.raises(TypeError, match=r"FSDP1\); use torch.distributed.fsdp.fully_shard"):
            mf.perturb_(wrapped, RADIUS)

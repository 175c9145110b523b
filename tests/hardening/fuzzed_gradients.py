"""Gradients of a fuzzed call, whose upstream gradient is drawn too, and how they are compared with the reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from drawn_tensors import Arguments, flat
from gradient_bounds import BOUNDS, stored
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

import mmer_fast as mf

Gradients = dict[str, list[Tensor]]  # by the argument's name
LARGEST_UPSTREAM = 4


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """An argument whose floating tensors are changed."""
    if isinstance(value, list):
        return [mapped(change, item) for item in value]
    is_floating = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize > 1
    return change(value) if is_floating else value


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def upstream_of(results: list[Tensor], seed: int) -> list[Tensor]:
    """Eighths within LARGEST_UPSTREAM, which are exact in every dtype."""
    generator, most = torch.Generator().manual_seed(seed), 8 * LARGEST_UPSTREAM
    return [torch.randint(-most, most + 1, x.shape, generator=generator).div(8).to(x) for x in results]


def with_gradients(function: Callable[..., Any], arguments: Arguments, seed: int) -> tuple[list[Tensor], Gradients]:
    """The results, and the gradients in the floating arguments; 0 where there is none."""
    arguments = {name: mapped(leaf, value) for name, value in arguments.items()}
    leaves = {name: [x for x in flat(value) if x.requires_grad] for name, value in arguments.items()}
    every = list(flat(leaves))
    results = list(flat(function(**arguments)))
    differentiable = [x for x in results if x.requires_grad]
    grads: tuple[Any, ...] = (None,) * len(every)
    if differentiable:
        grads = torch.autograd.grad(differentiable, every, upstream_of(differentiable, seed), allow_unused=True)
    found = iter([torch.zeros_like(x) if grad is None else grad for x, grad in zip(every, grads, strict=True)])
    return [x.detach() for x in results], {name: [next(found) for _ in xs] for name, xs in leaves.items()}


def bernoulli_kl(p_logits: Tensor, q_logits: Tensor, reduction: str) -> Tensor:
    p, q = (Bernoulli(logits=x, validate_args=False) for x in (p_logits, q_logits))
    reduce = {"batchmean": Tensor.mean, "sum": Tensor.sum, "none": Tensor.clone}[reduction]
    return reduce(kl_divergence(p, q).sum(-1))


def softmax_kl(p_logits: Tensor, q_logits: Tensor, reduction: str) -> Tensor:
    log_p, log_q = (x.sigmoid().log_softmax(-1) for x in (p_logits, q_logits))
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


def reversed_(x: Tensor, scale: float) -> Tensor:
    return -float(scale) * x  # a tensor takes no integer beyond 64 bits


def without_padding(x: Any, lengths: Any, padded_lengths: Any) -> list[Tensor]:
    """Packed and unpacked: what is behind a sample's length is 0, and the batch as long as the longest, or as said."""
    xs, counts = (value if isinstance(value, list) else [value] for value in (x, lengths))
    wanted = padded_lengths if isinstance(padded_lengths, list) else [padded_lengths] * len(xs)
    outputs = []
    for one, count, most in zip(xs, counts, wanted, strict=True):
        steps, trailing = one.shape[1], one.dim() - 2
        most = max(count.tolist(), default=0) if most is None else most
        valid = (torch.arange(steps) < count[:, None]).view(*one.shape[:2], *[1] * trailing)
        outputs.append(F.pad(one.where(valid, 0), (0, 0) * trailing + (0, most - steps)))
    return outputs


# What has no reference backend, in torch's own functions
PLAIN: dict[str, Callable[..., Any]] = {
    "bernoulli_kl_with_logits": bernoulli_kl,
    "softmax_kl_with_logits": softmax_kl,
    "grad_reverse": reversed_,
    "pack": without_padding,
}


def check_gradients(function: Callable[..., Any], arguments: Arguments, seed: int, found: Gradients) -> None:
    """They are those of the float64 reference but for what rounding can do to them."""
    wide = {name: mapped(Tensor.double, value) for name, value in arguments.items() if name != "backend"}
    with mf.use_backend("reference"):
        (exact, *_), expected = with_gradients(PLAIN.get(function.__name__, function), wide, seed)
    (upstream,) = upstream_of([exact], seed)
    allowances = BOUNDS[function.__name__](arguments, upstream, exact) if exact.numel() else {}
    for name, wants in expected.items():
        for got, want in zip(found[name], wants, strict=True):
            allowed = stored(allowances[name].sum_to_size(want.shape), want, got) if name in allowances else 0.0
            near = ((got - want).abs() <= allowed) | (got == want.to(got.dtype)) | (got.isnan() & want.isnan())
            near |= torch.as_tensor(allowed).isnan()
            assert bool(near.all()), f"the gradient of {name} is {got} and not {want}, for which {allowed} is allowed"

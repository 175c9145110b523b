"""Every public operator once, forward and backward, on inputs that depend on the size alone: what hardening repeats.

    CALLS["soft_topk"](n) -> [outputs and gradients]

A call draws from a generator of its own, so it gives the same numbers in any thread, process and order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast import ops
from mmer_fast.ops import dropout_add_layer_norm  # noqa: F401  defines the operators of the models
from mmer_fast.ops.linear import linear as linear_layer
from mmer_fast.ops.self_attention import self_attention as fused_self_attention

WIDTH = 8


class _Draws:
    """Standard normal tensors of fixed numbers."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).requires_grad_()

    def lengths(self, batch: int, most: int) -> Tensor:
        return torch.randint(1, most + 1, (batch,), generator=self.generator)


def _with_gradients(outputs: list[Tensor], *leaves: Tensor) -> list[Tensor]:
    """The outputs and the gradients of a loss in which each of their entries has another weight."""
    loss = sum((out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum() for out in outputs)
    assert isinstance(loss, Tensor)
    return [out.detach() for out in outputs] + list(torch.autograd.grad(loss, leaves))


def soft_topk(n: int) -> list[Tensor]:
    draw = _Draws()
    scores = draw(n, 2 * n)
    k, epsilon = (torch.full((n,), value, requires_grad=True) for value in (0.4, 0.3))
    weights, info = mf.soft_topk(scores, k, epsilon=epsilon, lengths=draw.lengths(n, 2 * n), return_info=True)
    return _with_gradients([weights, info.threshold], scores, k, epsilon)


def soft_topk_sinkhorn(n: int) -> list[Tensor]:
    draw = _Draws()
    scores = draw(n, 2 * n, dtype=torch.bfloat16)
    mask = torch.arange(2 * n) != n
    options = {"largest": False, "normalizer": "max", "solver": "sinkhorn", "iterations": 5}
    return _with_gradients([mf.soft_topk(scores, 1, mask=mask.expand(n, -1), **options).float()], scores)


def temporal_mask(n: int) -> list[Tensor]:
    draw = _Draws()
    scores = draw(n, 2 * n)
    return _with_gradients([mf.temporal_mask(scores, 0.4, lengths=draw.lengths(n, 2 * n))], scores)


def grad_reverse(n: int) -> list[Tensor]:
    x = _Draws()(n, WIDTH)
    return _with_gradients([mf.grad_reverse(x, 0.5)], x)


def pack_and_unpack(n: int) -> list[Tensor]:
    draw = _Draws()
    x = draw(4, n, WIDTH)
    layout = mf.packed_layout(draw.lengths(4, n))
    return _with_gradients([mf.unpack(mf.pack(x, layout) ** 2, layout)], x)


def masked_attention(n: int) -> list[Tensor]:
    draw = _Draws()
    q, k, v = draw(2, 4, n, WIDTH), draw(2, 2, n, WIDTH), draw(2, 2, n, WIDTH)
    weights, bias = torch.linspace(0, 1, 2 * n).view(2, n).requires_grad_(), draw(1, 4, n, n)
    options = {"lengths": draw.lengths(2, n), "causal": True, "dropout_p": 0.2, "seed": 5}
    out, lse = mf.masked_attention(q, k, v, weights, bias=bias, return_lse=True, **options)
    return _with_gradients([out, lse.clamp_min(-1e3)], q, k, v, weights, bias)


def packed_attention(n: int) -> list[Tensor]:
    draw = _Draws()
    ends = mf.packed_layout(draw.lengths(3, n)).cu_seqlens
    q, k, v = (draw(int(ends[-1]), 2, WIDTH, dtype=torch.bfloat16) for _ in range(3))
    out = mf.packed_attention(q, k, v, ends)
    assert isinstance(out, Tensor)
    return _with_gradients([out.float()], q, k, v)


def self_attention(n: int) -> list[Tensor]:
    """The helper of the models that has a backward pass of its own."""
    draw = _Draws()
    ends = mf.packed_layout(draw.lengths(3, n)).cu_seqlens
    x, weight, bias = draw(int(ends[-1]), WIDTH), draw(3 * WIDTH, WIDTH), draw(3 * WIDTH)
    out = fused_self_attention(x, weight, bias, 2, ends, n, 0.2, torch.tensor([13]))
    return _with_gradients([out], x, weight, bias)


def linear(n: int) -> list[Tensor]:
    """The helper of the models that takes oneDNN where that is faster; every n here is large enough for it.

    On whole numbers, whose sums are exact in any order: that of torch's products changes with the number of threads.
    """
    draw = _Draws()
    x, weight, bias, upstream = (
        draw(*shape).detach().round().requires_grad_() for shape in ((512 + n, 224), (224, 224), (224,), (512 + n, 224))
    )
    out = linear_layer(x, weight, bias)
    return [out.detach(), *torch.autograd.grad(out, (x, weight, bias), upstream.detach())]


def scaled_dot_product_attention(n: int) -> list[Tensor]:
    draw = _Draws()
    q, k, v, bias = draw(2, n, WIDTH), draw(2, n, WIDTH), draw(2, n, WIDTH), draw(n, n)
    return _with_gradients([mf.scaled_dot_product_attention(q, k, v, bias)], q, k, v, bias)


def divergences(n: int) -> list[Tensor]:
    draw = _Draws()
    p, q = draw(n, WIDTH), draw(n, WIDTH)
    return _with_gradients([mf.bernoulli_kl_with_logits(p, q), mf.softmax_kl_with_logits(p, q)], p, q)


def perturbation_of_lists(n: int) -> list[Tensor]:
    draw = _Draws()
    params, grads = ([draw(*shape).detach() for shape in ((n, 16 * n), (n, 1), (3,))] for _ in range(2))
    stash = [torch.empty_like(w) for w in params]
    norms, factors = ops.perturb_(params, grads, stash, 0.5, norms=ops.grad_norm(grads))
    moved = [w.clone() for w in params]
    ops.restore_(params, stash)
    return [norms, factors, *moved, *params]


def perturbation_of_a_module(n: int) -> list[Tensor]:
    draw = _Draws()
    module = nn.Linear(16 * n, n)
    for parameter in module.parameters():
        parameter.data, parameter.grad = draw(*parameter.shape).detach(), draw(*parameter.shape).detach()
    with mf.perturbed(module, 0.5) as info:
        moved = [info.norm, *(w.detach().clone() for w in module.parameters())]
    handle = mf.perturb_(module, 0.5, scope="awp")
    handle.restore_()
    mf.release_stash(module)
    return moved + [w.detach().clone() for w in module.parameters()]


def dropout(n: int) -> list[Tensor]:
    """The fused helpers of the models, whose kernels are reached by way of the dispatcher alone."""
    draw, seed = _Draws(), torch.tensor([11])
    x, residual, row = draw(n, 200), draw(n, 200), draw(200)
    operators = torch.ops.mmer_fast
    outputs = [operators.dropout(x, 0.3, seed), operators.relu_dropout(x, row, 0.3, seed)]
    outputs.append(operators.dropout_add_layer_norm(x, row, residual, row, row, 1e-5, 0.3, seed)[0])
    return _with_gradients(outputs, x, residual, row)


CALLS: dict[str, Callable[[int], list[Tensor]]] = {
    function.__name__: function
    for function in (
        soft_topk,
        soft_topk_sinkhorn,
        temporal_mask,
        grad_reverse,
        pack_and_unpack,
        masked_attention,
        packed_attention,
        self_attention,
        linear,
        scaled_dot_product_attention,
        divergences,
        perturbation_of_lists,
        perturbation_of_a_module,
        dropout,
    )
}


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two results agree to the bit, NaN and the sign of zero included."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(_bytes(x), _bytes(y))
        for x, y in zip(a, b, strict=True)
    )


def _bytes(x: Tensor) -> Tensor:
    """Of any layout: what has no entry may have strides that no view of bytes can have."""
    return torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().flatten()).view(torch.uint8)

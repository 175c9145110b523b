"""The dispatcher's operators of attention: one schema for all backends and both layouts, fakes, derivatives.

The way of a call: `mmer_fast.ops.attention` validates and chooses a backend; `FORWARD` calls the dispatcher's operator,
whose kernel is csrc/attention.cpp (CPU, CUDA), kernels/triton/attention.py or ops/attention_padded.py (reference).

The backward pass is an operator with a derivative of its own, by way of the float64 reference: who differentiates once
never pays for the second derivative, and who differentiates twice gets it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmer_fast.ops import attention_padded
from mmer_fast.ops._autograd import Differentiable, one_by_one
from mmer_fast.ops._library import define, implement, operator_of, qualified
from mmer_fast.ops.attention_inputs import Inputs

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_weights, Tensor? mask, Tensor? bias, Tensor? lengths, "
    "Tensor? query_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_queries, SymInt max_keys, "
    "bool causal, float scale, float dropout_p, Tensor? seed, bool exact_zero_weight_grad"
)
_FORWARD_SCHEMA = f"({_INPUTS}) -> (Tensor out, Tensor lse)"
# grad_weights is that of each head's own weights, (B, H, S) or (Tk, H): to be summed where heads share them.
_BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_INPUTS}, bool need_weights, bool need_bias) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_weights, Tensor grad_bias)"
)
# Operators of one schema each; "" is the compiled one, whose kernel the dispatcher picks by device.
SUFFIX = {"cpu": "", "cuda": "", "triton": "_triton", "reference": "_reference"}
_DIFFERENTIABLE = ("q", "k", "v", "key_weights", "bias")


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    inputs = Inputs(*args)
    q = inputs.q
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=inputs.wide)


def _fake_backward(grad_out: Tensor, grad_lse: Any, out: Any, lse: Any, *args: Any) -> tuple[Tensor, ...]:
    inputs, (need_weights, need_bias) = Inputs(*args[:-2]), args[-2:]
    q, k, bias = inputs.q, inputs.k, inputs.bias
    weights_shape = (k.shape[0], q.shape[1]) if inputs.cu_seqlens_q is not None else (*q.shape[:2], k.shape[2])
    grad_weights = q.new_empty(weights_shape if need_weights else (0,), dtype=inputs.wide)
    grad_bias = q.new_empty(bias.shape if need_bias and bias is not None else (0,), dtype=inputs.wide)
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape), grad_weights, grad_bias


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, *output)
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]
    ctx.set_materialize_grads(False)


def _inputs_of(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The arguments as they came, and what was saved behind them."""
    saved = list(ctx.saved_tensors)
    arguments = [saved.pop(0) if other is None else other[0] for other in ctx.others]
    return arguments, saved


def _make_backward(suffix: str) -> Any:
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * len(Inputs._fields)
        if grad_out is None and grad_lse is None:
            return nothing
        arguments, (out, lse) = _inputs_of(ctx)
        inputs = Inputs(*arguments)
        wanted = dict(zip(Inputs._fields, ctx.needs_input_grad, strict=True))
        grads = _BACKWARD[suffix](
            torch.zeros_like(out) if grad_out is None else grad_out,
            grad_lse,
            out,
            lse,
            *inputs,
            wanted["key_weights"],
            wanted["bias"],
        )
        named = dict(zip(_DIFFERENTIABLE, grads, strict=True))
        if wanted["key_weights"]:
            named["key_weights"] = _over_heads(named["key_weights"], inputs)
        return tuple(named[name] if wanted[name] else None for name in Inputs._fields)

    return backward


def _over_heads(grad_weights: Tensor, inputs: Inputs) -> Tensor:
    """The gradient of each head's own weights, summed where the heads share them."""
    assert inputs.key_weights is not None
    shared = grad_weights.dim() != inputs.key_weights.dim()
    return grad_weights.sum(1) if shared else grad_weights


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def _differentiate_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The second derivative: that of the reference's first one, in which out and lse are functions of the inputs."""
    arguments, _ = _inputs_of(ctx)
    grad_out, grad_lse, _, _, *rest = arguments
    inputs, (need_weights, need_bias) = Inputs(*rest[:-2]), rest[-2:]
    tracked = ["q", "k", "v"] + ["key_weights"] * need_weights + ["bias"] * need_bias
    if inputs.key_weights is not None and need_weights:  # each head's own, as the operator has it
        inputs = inputs._replace(key_weights=inputs.weights_of_each_head())

    def first_derivative(*values: Tensor) -> tuple[Tensor, ...]:
        *primals, cotangent_out, cotangent_lse = values

        def function(*now: Tensor) -> tuple[Tensor, Tensor]:
            changed: dict[str, Any] = dict(zip(tracked, now, strict=True))
            return attention_padded.attention_forward(*inputs._replace(**changed))

        pull: Any = torch.func.vjp(function, *primals)[1]
        return pull((cotangent_out, cotangent_lse))

    lse_shape = inputs.q.shape[:-1]
    cotangent_lse = inputs.q.new_zeros(lse_shape, dtype=inputs.wide) if grad_lse is None else grad_lse
    primals = [getattr(inputs, name) for name in tracked]
    given = dict(zip(_DIFFERENTIABLE, grads, strict=True))
    vjp: Any = torch.func.vjp(first_derivative, *primals, grad_out, cotangent_lse)
    outputs, pull = vjp
    cotangents = tuple(
        torch.zeros_like(x) if (grad := given[name]) is None else grad.to(x.dtype)
        for name, x in zip(tracked, outputs, strict=True)
    )
    *second, second_out, second_lse = pull(cotangents)
    named = dict(zip(tracked, second, strict=True))
    if need_weights:
        named["key_weights"] = _over_heads(named["key_weights"], Inputs(*rest[:-2]))
    by_input = tuple(named.get(name) for name in Inputs._fields)
    return second_out, None if grad_lse is None else second_lse, None, None, *by_input, None, None


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from mmer_fast.triton import attention as kernels

    return kernels.attention_forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, ...]:
    from mmer_fast.triton import attention as kernels

    return kernels.attention_backward(*args)


_PYTHON_KERNELS = {
    "_triton": (_triton_forward, _triton_backward),
    "_reference": (attention_padded.attention_forward, attention_padded.attention_backward),
}
FORWARD: dict[str, Differentiable] = {}
_BACKWARD: dict[str, Differentiable] = {}
for _suffix in ("", "_triton", "_reference"):
    _names = f"attention_forward{_suffix}", f"attention_backward{_suffix}"
    for _i, (_name, _schema) in enumerate(zip(_names, (_FORWARD_SCHEMA, _BACKWARD_SCHEMA), strict=True)):
        define(_name, _schema)
        if _suffix in _PYTHON_KERNELS:
            implement(_name, _PYTHON_KERNELS[_suffix][_i])
        torch.library.register_fake(qualified(_name), (_fake_forward, _fake_backward)[_i])
    _operators = [operator_of(_name) for _name in _names]
    FORWARD[_suffix] = Differentiable(_names[0], _setup_forward, _make_backward(_suffix), one_by_one)
    _BACKWARD[_suffix] = Differentiable(_names[1], _setup_backward, _differentiate_backward, one_by_one)

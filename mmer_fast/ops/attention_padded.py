"""The reference backend of attention: the operators' arguments, padded or packed, for `attention_reference`.

A packed batch is padded, computed, and packed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmer_fast.ops.attention_inputs import Inputs
from mmer_fast.ops.attention_reference import attention, attention_gradients
from mmer_fast.ops.lengths import length_mask

_WORD64 = 2**64 - 1


def attention_forward(*args: Any) -> tuple[Tensor, Tensor]:
    """out and lse of the fields of `Inputs`; differentiable as often as one likes."""
    inputs = Inputs(*args)
    layout, padded = _padded(inputs)
    out, lse = attention(*padded.tensors, **padded.options)
    return layout.pack_queries(out), layout.pack_queries(lse).to(inputs.wide)


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `attention_forward`, with `need_weights` and `need_bias` at the end of `args`."""
    inputs, (need_weights, need_bias) = Inputs(*args[:-2]), args[-2:]
    layout, padded = _padded(inputs)
    grad_lse = None if grad_lse is None else layout.pad_queries(grad_lse)
    dq, dk, dv, dm, db = attention_gradients(layout.pad_queries(grad_out), grad_lse, *padded.tensors, **padded.options)
    grad_weights, grad_bias = lse.new_empty((0,)), lse.new_empty((0,))
    if need_weights:
        grad_weights = layout.pack_keys(dm).to(inputs.wide)
    if need_bias and inputs.bias is not None:
        grad_bias = db.sum_to_size(inputs.bias.shape).to(inputs.wide).contiguous()
    return layout.pack_queries(dq), layout.pack_keys(dk), layout.pack_keys(dv), grad_weights, grad_bias


class _Padded(NamedTuple):
    """Arguments of the padded reference."""

    tensors: tuple[Any, ...]  # q, k, v, key_weights or None
    options: dict[str, Any]


class _Layout:
    """From the layout of the inputs to the padded one, and back."""

    def __init__(self, inputs: Inputs) -> None:
        self._packed = inputs.cu_seqlens_q is not None
        if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
            self._queries = _Packing(inputs.cu_seqlens_q, inputs.max_queries)
            self._keys = _Packing(inputs.cu_seqlens_k, inputs.max_keys)

    @property
    def counts(self) -> dict[str, Tensor]:
        return {"lengths": self._keys.lengths, "query_lengths": self._queries.lengths}

    def pad_queries(self, x: Tensor) -> Tensor:
        return self._queries.pad(x).transpose(1, 2) if self._packed else x

    def pad_keys(self, x: Tensor) -> Tensor:
        return self._keys.pad(x).transpose(1, 2) if self._packed else x

    def pack_queries(self, x: Tensor) -> Tensor:
        return (self._queries.pack(x.transpose(1, 2)) if self._packed else x).contiguous()

    def pack_keys(self, x: Tensor) -> Tensor:
        return (self._keys.pack(x.transpose(1, 2)) if self._packed else x).contiguous()


def _padded(inputs: Inputs) -> tuple[_Layout, _Padded]:
    layout = _Layout(inputs)
    passed_on = ("lengths", "query_lengths", "mask", "bias", "causal", "scale", "dropout_p", "exact_zero_weight_grad")
    options: dict[str, Any] = {name: getattr(inputs, name) for name in passed_on}
    options["seed"] = 0 if inputs.seed is None else int(inputs.seed) & _WORD64
    if inputs.cu_seqlens_q is None:
        return layout, _Padded((inputs.q, inputs.k, inputs.v, inputs.key_weights), options)
    options |= layout.counts
    m = None if inputs.key_weights is None else layout.pad_keys(inputs.weights_of_each_head())
    return layout, _Padded(
        (layout.pad_queries(inputs.q), layout.pad_keys(inputs.k), layout.pad_keys(inputs.v), m), options
    )


class _Packing:
    """Where the tokens of a packed batch stand in a padded one of `longest` steps."""

    def __init__(self, cu_seqlens: Tensor, longest: int) -> None:
        starts = cu_seqlens[:-1].to(torch.int64)
        self.lengths = cu_seqlens[1:].to(torch.int64) - starts
        self._taken = length_mask(self.lengths, longest)  # (B, T)
        self._sample, self._time = self._taken.nonzero(as_tuple=True)
        self._token = starts[self._sample] + self._time

    def pad(self, x: Tensor) -> Tensor:
        """(total, ...) -> (B, T, ...), 0 in the padding."""
        padded = x.new_zeros((*self._taken.shape, *x.shape[1:]))
        return padded.index_put((self._sample, self._time), x[self._token])

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (total, ...)."""
        return x[self._sample, self._time]

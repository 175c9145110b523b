"""SOFT top-k: a differentiable choice of the k largest entries of each row.

The operator of Xie et al. 2020 ("Differentiable Top-k with Optimal Transport"), used by RobMMR (Eq. 7-9) to mask
temporal units. The entropic transport plan onto two anchors has one unknown a row, so no plan is ever formed:

    T_i = sigma((s_i - lambda)/tau),   lambda such that sum_i T_i = k,   tau = epsilon Z / 2

The way of a call: `soft_topk` validates and chooses a backend; `_rows_forward` calls the dispatcher's operator, whose
kernel is csrc/soft_topk.cpp (CPU, CUDA), kernels/triton/soft_topk.py or ops/reference.py. The backward is an operator
too, with the closed form; a backward that is differentiated again is written in PyTorch (`reference`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmer_fast.ops import _backends, _validate, reference
from mmer_fast.ops._autograd import Differentiable
from mmer_fast.ops._library import define, implement, operator_of, qualified

_FORWARD_SCHEMA = (
    "(Tensor scores, Tensor? k, float k_value, Tensor? tau, float tau_value, Tensor? lengths, Tensor? mask, "
    "bool largest, int sinkhorn_iterations) -> (Tensor weights, Tensor threshold, Tensor certificate)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_weights, Tensor scores, Tensor threshold, Tensor? grad_threshold, Tensor? tau, float tau_value, "
    "Tensor? lengths, Tensor? mask, bool largest) -> (Tensor grad_scores, Tensor grad_k, Tensor grad_tau)"
)
# Operators of one schema each; "" is the compiled one, whose kernel the dispatcher picks by device.
_SUFFIX = {"cpu": "", "cuda": "", "triton": "_triton", "reference": "_reference"}


class SoftTopKInfo(NamedTuple):
    """Certificate of a solution; every entry has the batch shape of the scores.

    Attributes:
        threshold: float64, lambda in the units of the scores; +-inf where nothing or everything is taken.
            Differentiable in the scores, k and epsilon.
        residual: float64, sum_i sigma((s_i - lambda)/tau) - k: how far the row is from the fixed point.
        sweeps: int64, passes over the row: statistics, selection, sums and output.
    """

    threshold: Tensor
    residual: Tensor
    sweeps: Tensor


def soft_topk(
    scores: Tensor,
    k: int | float | Tensor,
    *,
    epsilon: float | Tensor = 0.1,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    largest: bool = True,
    normalizer: float | str = 1.0,
    solver: str = "newton",
    iterations: int | None = None,
    return_info: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, SoftTopKInfo]:
    """Weights in [0, 1] that are near 1 on the k largest scores of each row and sum to k.

    ``T_i = sigma((s_i - lambda)/tau)`` with ``sum_i T_i = k`` and ``tau = epsilon Z / 2`` (RobMMR Eq. 8-9; Xie et al.
    2020, section 3). Adding a constant to a row changes nothing; equal scores get equal weights.

    First and second derivatives in `scores`, `k` and `epsilon` are closed forms. ``solver="sinkhorn"`` has the implicit
    gradient at its own threshold, as the published operator has; it is the derivative of the output once converged.

    Args:
        scores: ``(..., n)``, float64, float32, bfloat16 or float16, any strides. Sums are kept in float32 or wider.
            -inf (+inf with ``largest=False``) gets weight 0.
        k: how much weight a row gets, from 0 to the number of its valid entries, fractions allowed: a number, or a
            tensor that broadcasts to the batch shape ``(...)``, with gradient if it requires one.
        epsilon: entropic regularisation, > 0, in the units of the cost ``(s - anchor)^2 / Z``: a number, or a tensor
            that broadcasts to ``(...)``. Towards 0 the result is the hard top-k.
        lengths: ``(...)`` integers: only the first ``lengths`` entries of a row take part. Padding gets weight 0 and
            gradient 0 and may hold anything, NaN too.
        mask: ``(..., n)`` bool, True where an entry takes part; an alternative to `lengths`.
        largest: False chooses the k smallest, as the code published with RobMMR does.
        normalizer: Z, a number > 0, or ``"max"``: the largest cost of the whole batch, detached (published code).
        solver: ``"newton"``: the fixed point, in a few sweeps of a row (in every family of rows that is tested at
            most 10, or 11 with the GPU kernels; 96 in any); ``"sinkhorn"``: the output of the published operator after
            `iterations` Sinkhorn iterations.
        iterations: Sinkhorn iterations, >= 1; only with ``solver="sinkhorn"`` (default 100).
        return_info: also return a `SoftTopKInfo`.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses (`mmer_fast.use_backend`).

    Returns:
        Weights ``(..., n)`` in the dtype of `scores`; with `return_info` also the certificate.

    Raises:
        TypeError: a tensor of the wrong dtype, or something else where a number belongs.
        ValueError: wrong shapes, epsilon <= 0, k outside its range (naming the row where the values can be read: on the
            CPU; a CUDA row with such a k becomes NaN), lengths beyond n, both `lengths` and `mask`, NaN scores in
            `mmer_fast.checked` mode (a NaN row otherwise).
        BackendUnavailable: `backend` cannot serve these tensors.

    Examples:
        >>> soft_topk(torch.tensor([[3.0, 1.0, 2.0]]), 1, epsilon=0.5)
        tensor([[0.8796, 0.0024, 0.1180]])
    """
    shape = _validate.dense_tensor("scores", scores).shape
    if not shape:
        raise ValueError("scores must have at least one dimension (..., n), got a scalar")
    n = shape[-1]
    name = _backends.select("soft_topk", scores.device.type, backend, _cannot(n))
    sinkhorn_iterations = _validate_solver(solver, iterations)
    _validate.flag("largest", largest)
    _validate.flag("return_info", return_info)
    _validate.ragged(scores, lengths, mask)
    k_row, k_value = _validate.row_number("k", k, scores, minimum=0.0, maximum=n)
    epsilon_row, epsilon_value = _validate.row_number("epsilon", epsilon, scores, above=0.0)
    _validate.counts_within(k_row, k_value, lengths, mask)

    tau_row, tau_value = epsilon_row, 0.5 * epsilon_value
    if isinstance(normalizer, str):
        if normalizer != "max":
            raise ValueError(f"normalizer must be a number > 0 or 'max', got {normalizer!r}")
        cost = _largest_cost(scores.detach(), lengths, mask)
        if epsilon_row is None:
            tau_row = (0.5 * epsilon_value * cost).expand(shape[:-1]).flatten()
        else:
            tau_row = 0.5 * cost * epsilon_row
    else:
        z = _validate.number("normalizer", normalizer, above=0.0)
        if epsilon_row is not None:
            tau_row = epsilon_row * (0.5 * z)
        else:
            tau_value *= z
            if tau_value == 0:
                raise ValueError(f"epsilon must be so large that epsilon Z / 2 > 0 in float64, got {epsilon_value:g}")

    rows = _as_rows(scores)
    if n > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    weights, threshold, certificate = _rows_forward(
        name,
        rows,
        k_row,
        k_value,
        tau_row,
        tau_value,
        None if lengths is None else lengths.flatten().to(torch.int64),
        None if mask is None else _as_rows(mask),
        largest,
        sinkhorn_iterations,
    )
    if _backends.is_checked():
        _validate.no_nan_rows("scores", threshold)
    weights = weights if len(shape) == 2 else weights.reshape(shape)
    if not return_info:
        return weights
    batch_shape = shape[:-1]
    info = SoftTopKInfo(
        threshold.reshape(batch_shape),
        certificate[:, 0].reshape(batch_shape),
        certificate[:, 1].nan_to_num(0.0).to(torch.int64).reshape(batch_shape),
    )
    return weights, info


_LONGEST_ROW = 2**32 - 1
_LONGEST_GPU_ROW = 2**30 - 1
_NOBODY: Mapping[str, str] = {}


def _cannot(n: int) -> Mapping[str, str]:
    """Backends that cannot serve rows of `n` entries, and why."""
    # While a graph is made, the kernels alone check: it would be bound to such sizes.
    if torch.compiler.is_compiling() or n <= _LONGEST_GPU_ROW:
        return _NOBODY
    reason = "serves rows of up to {} entries, not {}"
    cannot = dict.fromkeys(("cuda", "triton"), reason.format(_LONGEST_GPU_ROW, n))
    return {**cannot, "cpu": reason.format(_LONGEST_ROW, n)} if n > _LONGEST_ROW else cannot


def _as_rows(x: Tensor) -> Tensor:
    """(..., n) as (rows, n). Not reshape(-1, n), which has no answer where n is 0."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _validate_solver(solver: str, iterations: int | None) -> int:
    if solver == "newton":
        if iterations is not None:
            raise ValueError(f"iterations is for solver='sinkhorn' only, got iterations={iterations} with 'newton'")
        return 0
    if solver != "sinkhorn":
        raise ValueError(f"solver must be 'newton' or 'sinkhorn', got {solver!r}")
    if iterations is None:
        return 100
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations must be an int, got {type(iterations).__name__}")
    if not 1 <= iterations < 2**63:
        raise ValueError(f"iterations must be within [1, 2^63), got {iterations}")
    return iterations


def _largest_cost(scores: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Z of the published code: max over the batch of s^2 and (s - 1)^2, over finite valid entries; () float64."""
    s = scores.to(torch.float64)
    valid = s.isfinite() & reference.valid_entries(s, lengths, mask)
    if s.numel() == 0:
        return torch.ones((), dtype=torch.float64, device=s.device)
    cost = torch.maximum(s.square(), (s - 1).square()).masked_fill(~valid, 0.0).amax()
    return torch.where(cost > 0, cost, torch.ones_like(cost))


def _rows_forward(
    name: str,
    scores: Tensor,
    k: Tensor | None,
    k_value: float,
    tau: Tensor | None,
    tau_value: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    largest: bool,
    sinkhorn_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _FORWARD[_SUFFIX[name]](scores, k, k_value, tau, tau_value, lengths, mask, largest, sinkhorn_iterations)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, k, _, tau, tau_value, lengths, mask, largest, _ = inputs
    ctx.save_for_backward(scores, output[1], tau, lengths, mask)
    ctx.tau_value, ctx.largest, ctx.k_given = tau_value, largest, k is not None
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _make_backward(suffix: str) -> Any:
    def backward(
        ctx: Any, grad_weights: Tensor | None, grad_threshold: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        scores, threshold, tau, lengths, mask = ctx.saved_tensors
        if grad_weights is None and grad_threshold is None:
            return (None,) * 9
        if grad_weights is None:
            grad_weights = torch.zeros_like(scores)
        # create_graph: the closed form in PyTorch, in which the saved threshold is a differentiable function too.
        function = reference.soft_topk_backward if torch.is_grad_enabled() else _BACKWARD_OPERATORS[suffix]
        grad_scores, grad_k, grad_tau = function(
            grad_weights, scores, threshold, grad_threshold, tau, ctx.tau_value, lengths, mask, ctx.largest
        )
        grad_k = grad_k if ctx.k_given else None
        grad_tau = grad_tau if tau is not None else None
        return grad_scores, grad_k, None, grad_tau, None, None, None, None, None

    return backward


def _fake_forward(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = scores.shape[0]
    return (
        scores.new_empty(scores.shape),
        scores.new_empty((rows,), dtype=torch.float64),
        scores.new_empty((rows, 2), dtype=torch.float64),
    )


def _fake_backward(grad_weights: Tensor, scores: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    row = scores.new_empty((scores.shape[0],), dtype=torch.float64)
    return scores.new_empty(scores.shape), row, torch.empty_like(row)


def _make_vmap(operator: Any) -> Any:
    """vmap: rows are independent, so a mapped dimension only makes more rows."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        flat, rows = [], 0
        for arg, dim in zip(args, in_dims, strict=True):
            if not isinstance(arg, Tensor):
                flat.append(arg)
                continue
            stacked = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            flat.append(stacked.flatten(0, 1))
            rows = stacked.shape[1]
        outputs = operator(*flat)
        return tuple(out.unflatten(0, (info.batch_size, rows)) for out in outputs), (0,) * len(outputs)

    return rule


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mmer_fast.triton import soft_topk as kernels

    return kernels.soft_topk_forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mmer_fast.triton import soft_topk as kernels

    return kernels.soft_topk_backward(*args)


_PYTHON_KERNELS = {
    "_triton": (_triton_forward, _triton_backward),
    "_reference": (reference.soft_topk_forward, reference.soft_topk_backward),
}
_FORWARD: dict[str, Differentiable] = {}
_BACKWARD_OPERATORS: dict[str, Any] = {}
for _suffix in ("", "_triton", "_reference"):
    _forward_name, _backward_name = f"soft_topk_forward{_suffix}", f"soft_topk_backward{_suffix}"
    define(_forward_name, _FORWARD_SCHEMA)
    define(_backward_name, _BACKWARD_SCHEMA)
    if _suffix in _PYTHON_KERNELS:
        implement(_forward_name, _PYTHON_KERNELS[_suffix][0])
        implement(_backward_name, _PYTHON_KERNELS[_suffix][1])
    torch.library.register_fake(qualified(_forward_name), _fake_forward)
    torch.library.register_fake(qualified(_backward_name), _fake_backward)
    _BACKWARD_OPERATORS[_suffix] = operator_of(_backward_name)
    torch.library.register_vmap(qualified(_backward_name), _make_vmap(_BACKWARD_OPERATORS[_suffix]))
    _FORWARD[_suffix] = Differentiable(_forward_name, _setup_context, _make_backward(_suffix), _make_vmap)

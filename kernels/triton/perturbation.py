"""In-place weight perturbation over lists of tensors in Triton.

    plain      u_i = g_i           d_i = g_i
    adaptive   u_i = |w_i| g_i     d_i = w_i^2 g_i

    norm = |u|_2 of a group: all tensors, or each
    stash_i = w_i, bit for bit;   w_i <- w_i + factor d_i;   factor = gamma/norm, awp: gamma |w|_2/norm

One launch writes the partial norms of chunks, one adds them up and moves the weights: every program adds up all
those of its group, in the same order, which costs less than a launch as long as they are few (perturbation_table.py
keeps them so). One launch restores. Each of them once for every pair of dtypes. No atomics, no host synchronisation.

Half types are computed in float32, whatever holds a float64 in float64. The kernels see flat memory; tensors whose
entries do not lie there in the same order go through contiguous copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch_options import launch_options
from .perturbation_blocks import add_block, load_entries, load_record, move_block, store_entries, whole_blocks
from .perturbation_math import LOWEST, norm_of_norms, power_of_two, root, step_of
from .perturbation_table import CHUNK, COLUMNS, Launch, Plan, plan_of
from .soft_topk_rows import bits_of, compute_dtype, scalar_of_bits

GLOBAL, TENSOR, AWP = 0, 1, 2
WARPS = 8
BYTES = 16384  # that a program loads at a time: four vectors a thread
PARTS_BLOCK = 1024  # partial norms that it loads at a time

_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def perturbation_norm(
    table_ptr, parts_ptr, weight_parts_ptr, COLUMNS: tl.constexpr, WEIGHT: tl.constexpr, GRAD: tl.constexpr,
    COMPUTE: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """|u|_2 of a chunk, and |w|_2 where weight_parts_ptr is given."""
    AWP: tl.constexpr = weight_parts_ptr is not None
    record_ptr, weight, grad, _, entries = load_record(table_ptr, COLUMNS)
    i_part = tl.load(record_ptr + 6)
    total, exponent = tl.full((), 0.0, tl.float64), tl.full((), LOWEST, tl.int32)
    weight_total, weight_exponent = total, exponent
    whole = whole_blocks(weight | grad, entries, BLOCK)
    for i_first in range(0, whole, BLOCK):
        i_entry = i_first + tl.arange(0, BLOCK)
        total, exponent, weight_total, weight_exponent = add_block(
            weight, grad, i_entry, entries, total, exponent, weight_total, weight_exponent,
            WEIGHT, GRAD, COMPUTE, ADAPTIVE, AWP, True,
        )  # fmt: skip
    for i_first in range(whole, entries, BLOCK):
        i_entry = i_first + tl.arange(0, BLOCK)
        total, exponent, weight_total, weight_exponent = add_block(
            weight, grad, i_entry, entries, total, exponent, weight_total, weight_exponent,
            WEIGHT, GRAD, COMPUTE, ADAPTIVE, AWP, False,
        )  # fmt: skip
    tl.store(parts_ptr + i_part, root(total, exponent))
    if AWP:
        tl.store(weight_parts_ptr + i_part, root(weight_total, weight_exponent))


@triton.jit
def perturbation_combine(
    ranges_ptr, parts_ptr, weight_parts_ptr, norms_ptr, weight_norms_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    """The norm of a group from its partial norms: where no step follows to do it."""
    group = tl.program_id(0).to(tl.int64)
    first, end = tl.load(ranges_ptr + 2 * group), tl.load(ranges_ptr + 2 * group + 1)
    tl.store(norms_ptr + group, norm_of_norms(parts_ptr, first, end, BLOCK))
    if weight_parts_ptr is not None:
        tl.store(weight_norms_ptr + group, norm_of_norms(weight_parts_ptr, first, end, BLOCK))


@triton.jit(do_not_specialize=["radius_bits"])
def perturbation_step(
    table_ptr, parts_ptr, weight_parts_ptr, given_norms_ptr, given_weight_norms_ptr, norms_ptr, factors_ptr,
    radius_bits, COLUMNS: tl.constexpr, WEIGHT: tl.constexpr, BITS: tl.constexpr, GRAD: tl.constexpr,
    COMPUTE: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr, PARTS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Stash and step of a chunk, from the partial norms of its group, or from norms that are given."""
    record_ptr, weight, grad, stash, entries = load_record(table_ptr, COLUMNS)
    group, leads = tl.load(record_ptr + 4), tl.load(record_ptr + 5)
    first, end = tl.load(record_ptr + 6), tl.load(record_ptr + 7)
    reach = scalar_of_bits(radius_bits)
    if given_norms_ptr is not None:
        norm = tl.load(given_norms_ptr + group)
    else:
        norm = norm_of_norms(parts_ptr, first, end, PARTS_BLOCK)
    if given_weight_norms_ptr is not None:
        reach *= tl.load(given_weight_norms_ptr + group)
    elif weight_parts_ptr is not None:
        reach *= norm_of_norms(weight_parts_ptr, first, end, PARTS_BLOCK)
    limit: tl.constexpr = 1020 if ADAPTIVE or COMPUTE.is_fp64() else 126
    moves, exponent, scale = step_of(norm, reach, limit)
    if leads != 0:
        tl.store(norms_ptr + group, norm)
        tl.store(factors_ptr + group, power_of_two(-exponent, tl.float64) * scale)

    largest: tl.constexpr = 1.7e308 if COMPUTE.is_fp64() else 3.4e38
    scale = tl.minimum(scale, largest).to(COMPUTE)  # an infinite one would move entries without gradient: 0 inf
    whole = whole_blocks(weight | grad | stash, entries, BLOCK)
    for i_first in range(0, whole, BLOCK):
        i_entry = i_first + tl.arange(0, BLOCK)
        move_block(
            weight, grad, stash, i_entry, entries, moves, exponent, scale,
            WEIGHT, BITS, GRAD, COMPUTE, ADAPTIVE, True,
        )  # fmt: skip
    for i_first in range(whole, entries, BLOCK):
        i_entry = i_first + tl.arange(0, BLOCK)
        move_block(
            weight, grad, stash, i_entry, entries, moves, exponent, scale,
            WEIGHT, BITS, GRAD, COMPUTE, ADAPTIVE, False,
        )  # fmt: skip


@triton.jit
def perturbation_restore(table_ptr, COLUMNS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """w = stash of a chunk."""
    _, weight, _, stash, entries = load_record(table_ptr, COLUMNS)
    whole = whole_blocks(weight | stash, entries, BLOCK)
    for i_first in range(0, whole, BLOCK):
        i_entry = i_first + tl.arange(0, BLOCK)
        store_entries(weight, i_entry, entries, load_entries(stash, i_entry, entries, BITS, True), True)
    for i_first in range(whole, entries, BLOCK):
        i_entry = i_first + tl.arange(0, BLOCK)
        store_entries(weight, i_entry, entries, load_entries(stash, i_entry, entries, BITS, False), False)


def grad_norm(grads: Sequence[Tensor], params: Sequence[Tensor], scope: int, adaptive: bool) -> tuple[Tensor, Tensor]:
    """|u|_2 of each group, and with scope awp |w|_2 of each tensor.

    Args:
        grads: tensors of any shapes, strides and floating-point dtypes, one device.
        params: of the same shapes; read with `adaptive` and with scope awp, else it may be empty.
        scope: `GLOBAL` (one group), `TENSOR` or `AWP` (a group for each tensor).

    Returns:
        ``(norms [groups], weight_norms [n] or [0])``, float64.
    """
    needs_weights = adaptive or scope == AWP
    flat = [_flat(pair) for pair in (zip(grads, params, strict=True) if needs_weights else ((g,) for g in grads))]
    with torch.cuda.device_of(grads[0]):
        flat_grads, flat_params = [f[0] for f in flat], [f[1] for f in flat] if needs_weights else []
        plan = plan_of(flat_params, flat_grads, [], scope == GLOBAL)
        norms = _empty(len(plan.ranges), grads[0])
        weight_norms = _empty(len(grads) if scope == AWP else 0, grads[0])
        parts, weight_parts = _launch_norm(plan, grads[0], scope, adaptive)
        perturbation_combine[(len(plan.ranges),)](
            plan.ranges, parts, weight_parts, norms, weight_norms, BLOCK=PARTS_BLOCK, **launch_options(WARPS)
        )
    return norms, weight_norms


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    stash: Sequence[Tensor],
    norms: Tensor | None,
    weight_norms: Tensor | None,
    radius: float,
    scope: int,
    adaptive: bool,
) -> tuple[Tensor, Tensor]:
    """stash = w and w += factor d; where a norm is 0 or not finite, w keeps its bits and factor is 0.

    Args:
        params, stash: same shapes and dtypes, any strides; no two share memory.
        grads: of the same shapes.
        norms: ``[groups]`` float64, or None: then they are computed.
        weight_norms: ``[n]`` float64, only with `norms` and scope awp.
        radius: gamma, >= 0.

    Returns:
        ``(norms [groups], factors [groups])``, float64.
    """
    flat = [_flat(tensors) for tensors in zip(params, grads, stash, strict=True)]
    flat_params, flat_grads, flat_stash = ([f[column] for f in flat] for column in range(3))
    with torch.cuda.device_of(params[0]):
        plan = plan_of(flat_params, flat_grads, flat_stash, scope == GLOBAL)
        parts: tuple[Tensor | None, Tensor | None] = (None, None)
        given: tuple[Tensor | None, Tensor | None] = (None, None)
        if norms is None:
            parts = _launch_norm(plan, params[0], scope, adaptive)
        else:
            given = norms.contiguous(), weight_norms.contiguous() if weight_norms is not None and scope == AWP else None
        written = _empty(len(plan.ranges), params[0]), _empty(len(plan.ranges), params[0])
        launched: list[Launch] = []
        try:
            for launch in plan.step:
                perturbation_step[(len(launch.table),)](
                    launch.table, *parts, *given, *written, bits_of(radius),
                    COLUMNS=COLUMNS, WEIGHT=_TYPES[launch.weight_dtype], BITS=_bits(launch),
                    GRAD=_TYPES[launch.grad_dtype], COMPUTE=_compute(launch), ADAPTIVE=adaptive,
                    BLOCK=_block(launch.weight_dtype, launch.grad_dtype), PARTS_BLOCK=PARTS_BLOCK,
                    **launch_options(WARPS),
                )  # fmt: skip
                launched.append(launch)
            _copy_back(flat_stash, stash)
            _copy_back(flat_params, params)
        except BaseException:  # an interrupt between two launches: all or nothing
            _launch_restore(launched)
            _copy_back(flat_params, params)
            raise
    return written


def restore_(params: Sequence[Tensor], stash: Sequence[Tensor]) -> None:
    """w = stash, bit for bit; lists as in `perturb_`."""
    pairs = []
    for pair in zip(params, stash, strict=True):
        if _same_layout(pair) and pair[0].dtype == pair[1].dtype and pair[0].device == pair[1].device:
            pairs.append(pair)
        else:
            pair[0].copy_(pair[1])
    if pairs:
        with torch.cuda.device_of(params[0]):
            _launch_restore(plan_of([w for w, _ in pairs], [], [kept for _, kept in pairs], True).step)


def _launch_norm(plan: Plan, like: Tensor, scope: int, adaptive: bool) -> tuple[Tensor, Tensor | None]:
    """The partial norms of u, and of w with scope awp."""
    parts = _empty(plan.parts, like)
    weight_parts = _empty(plan.parts, like) if scope == AWP else None
    for launch in plan.norm:
        reads_weights = adaptive or scope == AWP
        block = _block(launch.grad_dtype, *([launch.weight_dtype] if reads_weights else []))
        perturbation_norm[(len(launch.table),)](
            launch.table, parts, weight_parts,
            COLUMNS=COLUMNS, WEIGHT=_TYPES[launch.weight_dtype], GRAD=_TYPES[launch.grad_dtype],
            COMPUTE=_compute(launch), ADAPTIVE=adaptive, BLOCK=block, **launch_options(WARPS),
        )  # fmt: skip
    return parts, weight_parts


def _launch_restore(launches: list[Launch]) -> None:
    for launch in launches:
        perturbation_restore[(len(launch.table),)](
            launch.table,
            COLUMNS=COLUMNS,
            BITS=_bits(launch),
            BLOCK=_block(launch.weight_dtype),
            **launch_options(WARPS),
        )


def _copy_back(flat: list[Tensor], tensors: Sequence[Tensor]) -> None:
    """From the contiguous copies that a kernel has written; a tensor that it wrote itself stands in for its copy."""
    for copy, tensor in zip(flat, tensors, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)


def _empty(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.float64, device=like.device)


def _compute(launch: Launch) -> tl.dtype:
    return compute_dtype(torch.float64 if torch.float64 in (launch.weight_dtype, launch.grad_dtype) else torch.float32)


def _block(*dtypes: torch.dtype) -> int:
    """The entries of a program's block, a power of two, where it loads tensors of these dtypes."""
    return min(CHUNK, 1 << (BYTES // sum(dtype.itemsize for dtype in dtypes)).bit_length() - 1)


def _bits(launch: Launch) -> tl.dtype:
    return {2: tl.int16, 4: tl.int32, 8: tl.int64}[launch.weight_dtype.itemsize]


def _flat(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`tensors` if entry i of one lies in memory where entry i of the others does, else contiguous ones."""
    return tensors if _same_layout(tensors) else tuple(t.contiguous() for t in tensors)


def _same_layout(tensors: tuple[Tensor, ...]) -> bool:
    if all(t.is_contiguous() for t in tensors):
        return True
    first = tensors[0]
    if any(t.stride() != first.stride() for t in tensors):
        return False
    dense = 1
    for stride, size in sorted(zip(first.stride(), first.shape, strict=True)):
        if size != 1 and stride != dense:
            return False
        dense *= size
    return True

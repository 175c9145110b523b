"""The tables that let one launch of the weight perturbation serve tensors of any number and sizes.

A program serves one record, a chunk of one tensor, of `COLUMNS` int64:

    weight, grad, stash   addresses of the chunk's first entries; 0 where there is no such tensor
    entries               0 in the one chunk of an empty tensor
    group, leads          the norm that the chunk belongs to; 1 in the one chunk that writes it
    first, end            the partial norms of the group; in a table of norms, `first` is where the chunk's goes

A table is copied to the device once, and kept for as long as calls come with the same addresses and sizes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import triton

COLUMNS = 8
CHUNK = 4096  # entries of the shortest chunk
STEP_CHUNK = 16384  # and of the longest one of a step
PROGRAMS = 1024  # about as many partial norms as each program of a step adds up, however many entries there are
CACHED = 32  # plans kept
SPARE = 2**16  # numbers of page-locked memory that are kept for CUDA graphs, at least


class Launch(NamedTuple):
    """The chunks of the tensors with one pair of dtypes; without weights or gradients both are those of the others."""

    weight_dtype: torch.dtype
    grad_dtype: torch.dtype
    table: Tensor  # [chunks, COLUMNS] int64


class Plan(NamedTuple):
    norm: list[Launch]
    step: list[Launch]
    parts: int  # partial norms of all groups
    ranges: Tensor  # [groups, 2] int64: first and end of a group's partial norms
    memory: tuple[Tensor, ...]  # what the tables are views of, and inside a CUDA graph its source
    copied: tuple[torch.cuda.Stream, torch.cuda.Event] | None  # for calls on other streams


_cache: OrderedDict[tuple, Plan] = OrderedDict()
_captured: dict[int, Plan] = {}  # in CUDA graphs, which keep bare addresses: never freed
_spare: Tensor | None = None  # page-locked memory for the tables that a CUDA graph copies: a capture may lock none
_lock = threading.Lock()


def plan_of(weights: Sequence[Tensor], grads: Sequence[Tensor], stash: Sequence[Tensor], one_group: bool) -> Plan:
    """The tables for flat tensors on the current device; any list may be empty, the others have the same lengths.

    A CUDA graph can capture a call after one with as many tensors of the same sizes. Where those were at other
    addresses, it captures the copy of the table too.
    """
    lists = (weights, grads, stash)
    device = (grads or weights)[0].device
    entries = tuple(tuple((t.data_ptr(), t.numel(), t.dtype) for t in tensors) for tensors in lists)
    key = (one_group, CHUNK, PROGRAMS, device, entries)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _lock:
        plan = _cache.get(key)
        if plan is not None:
            _cache.move_to_end(key)
    if plan is None:
        plan = _build(lists, one_group, device, capturing)
        if not capturing:
            with _lock:
                _cache[key] = plan
                if len(_cache) > CACHED:
                    _cache.popitem(last=False)
    elif plan.copied is not None and not capturing:
        _join(plan, *plan.copied)
    if capturing:
        _captured[id(plan)] = plan
    elif device.type == "cuda":
        _keep_spare(4 * plan.memory[0].numel())
    return plan


def _keep_spare(numbers: int) -> None:
    global _spare
    if _spare is None or _spare.numel() < numbers:
        with _lock:
            _spare = torch.empty(max(numbers, SPARE), dtype=torch.int64, pin_memory=True)


def _join(plan: Plan, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
    """The table was copied on `stream`: another one waits, and holds the memory until its kernels have run."""
    current = torch.cuda.current_stream()
    if current != stream:
        current.wait_event(event)
        plan.memory[0].record_stream(current)


def _build(lists: tuple[Sequence[Tensor], ...], one_group: bool, device: torch.device, capturing: bool) -> Plan:
    weights, grads, stash = lists
    count = max(len(weights), len(grads))
    sizes = np.array([t.numel() for t in grads or weights], dtype=np.int64)
    share = triton.next_power_of_2(triton.cdiv(int(sizes.sum()), PROGRAMS))
    norm_chunk = min(max(share, CHUNK), 2**30)  # the kernels count the entries of a chunk in int32
    addresses, widths = np.zeros((2, count, 3), dtype=np.int64)
    for column, tensors in enumerate(lists):
        if tensors:
            addresses[:, column] = [t.data_ptr() for t in tensors]
            widths[:, column] = [t.element_size() for t in tensors]

    norm, of_norm = _records(addresses, widths, sizes, norm_chunk)
    step, of_step = _records(addresses, widths, sizes, min(norm_chunk, STEP_CHUNK))
    ends = np.cumsum(np.bincount(of_norm, minlength=count))
    ranges = np.stack([np.append(0, ends[:-1]), ends], axis=1)
    norm[:, 6] = np.arange(len(norm))
    if one_group:
        ranges = np.array([[0, len(norm)]])
        step[:, 5] = np.arange(len(step)) == 0
        step[:, 6:] = ranges
    else:
        step[:, 4] = of_step
        step[:, 5] = np.append(True, of_step[1:] != of_step[:-1])
        step[:, 6:] = ranges[of_step]

    pairs = [(w.dtype, g.dtype) for w, g in zip(weights or grads, grads or weights, strict=True)]
    kinds = list(dict.fromkeys(pairs))
    kind = np.array([kinds.index(pair) for pair in pairs])
    parts = [norm[kind[of_norm] == k] for k in range(len(kinds))] if grads else []
    parts += [step[kind[of_step] == k] for k in range(len(kinds))] if stash else []
    host = torch.from_numpy(np.concatenate([*(part.reshape(-1) for part in parts), ranges.reshape(-1)]))
    memory, copied = _upload(host, device, capturing)
    views = list(memory[0].split([part.size for part in parts] + [ranges.size]))
    tables = [Launch(*kinds[i % len(kinds)], view.view(-1, COLUMNS)) for i, view in enumerate(views[:-1])]
    norms = len(kinds) if grads else 0
    return Plan(tables[:norms], tables[norms:], len(norm), views[-1].view(-1, 2), memory, copied)


def _records(addresses: np.ndarray, widths: np.ndarray, sizes: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """The records of all chunks, in the order of the tensors, and the tensor that each is of."""
    counts = np.maximum(1, -(-sizes // chunk))
    tensor = np.repeat(np.arange(len(sizes)), counts)
    start = (np.arange(len(tensor)) - (np.cumsum(counts) - counts)[tensor]) * chunk
    records = np.zeros((len(tensor), COLUMNS), dtype=np.int64)
    records[:, :3] = addresses[tensor] + start[:, None] * widths[tensor]
    records[:, 3] = np.minimum(sizes[tensor] - start, chunk)
    return records, tensor


def _upload(host: Tensor, device: torch.device, capturing: bool) -> tuple[tuple[Tensor, ...], tuple | None]:
    if device.type != "cuda":
        return (host.to(device),), None
    pinned = _pinned(host, capturing)
    memory = pinned.to(device, non_blocking=True)
    if capturing:
        return (memory, pinned), None
    stream = torch.cuda.current_stream()
    return (memory,), (stream, stream.record_event())


def _pinned(host: Tensor, capturing: bool) -> Tensor:
    """A copy in page-locked memory; in a capture of what calls before it have left, as far as that goes."""
    global _spare
    with _lock:
        if not capturing or _spare is None or _spare.numel() < host.numel():
            return host.pin_memory()
        taken, _spare = _spare[: host.numel()], _spare[host.numel() :]
    return taken.copy_(host)

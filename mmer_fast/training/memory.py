"""Memory that ran out in a step or an evaluation: what was said of it, how large that was, and what needs less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mmer_fast.data import Split
from mmer_fast.training.config import TrainConfig
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.loop_config import LoopConfig
from mmer_fast.training.order import sorted_batches

Result = TypeVar("Result")

_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""In the messages of torch's errors. `torch.OutOfMemoryError` is the class of some of them only."""
_SENTENCES = 3
"""Of a message that are told; torch's advice about its allocator comes after them."""


class Shortage(Exception):
    """Memory ran out; the message is what `shortage` made of it."""


def unless_short(compute: Callable[[], Result]) -> Result:
    """What `compute` returns.

    Raises:
        Shortage: memory ran out in it. What it held is free by then: no error refers to its frames any more.
    """
    try:
        return compute()
    except TrainingError:  # says so already
        raise
    except (MemoryError, RuntimeError) as error:
        cause = shortage(error)
        if cause is None:
            raise
    raise Shortage(cause)


def shortage(error: BaseException) -> str | None:
    """What is said, in a line, where memory ran out, on a device or for the CPU; None for any other error."""
    for line in str(error).splitlines():
        found = [line.index(sign) for sign in _SIGNS if sign in line]
        if found:
            return ". ".join(line[min(found) :].strip().split(". ")[:_SENTENCES]).rstrip(".")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return next(iter(str(error).splitlines()), "out of memory")
    return None


def step_size(split: Split, micro_batches: Sequence[Tensor]) -> str:
    """How large a step is, in words: its samples, and of each modality the longest of them and the tokens of all.

    Args:
        split: of the samples.
        micro_batches: the positions of their samples, at least one in all.
    """
    index_b = torch.cat(list(micro_batches)).numpy()
    cut = f" in {len(micro_batches)} micro-batches" if len(micro_batches) > 1 else ""
    parts = [f"{len(index_b)} sample(s){cut}"]
    for name, lengths_n in split.lengths.items():
        lengths_b = lengths_n[index_b]
        parts.append(f"{name} up to {lengths_b.max()} long, {lengths_b.sum()} tokens")
    return "; ".join(parts)


def smaller_settings(config: LoopConfig, *, whole: bool) -> list[str]:
    """Options of `mmer-fast train` whose steps need less memory.

    Args:
        config: of a training.
        whole: whether its batches cannot be cut (`Network.group`).
    """
    size, cut = config.batch_size, config.accumulation
    finer = next((n for n in range(cut + 1, size + 1) if size % n == 0), None)
    found = []
    if finer is not None and not whole:
        found.append(f"--set accumulation={finer} (now {cut}; {size // finer} sample(s) at a time)")
    if size > 1:
        found.append(f"--batch-size below {size}")
    if isinstance(config, TrainConfig):
        halves = config.step == "fast" and config.perturbation not in ("fgsm", "pgd")
        if halves and config.precision == "float32":
            found.append("--set precision=bfloat16")
        if config.cuda_graph:
            found.append("--set cuda_graph=false")
    return [*found, "a smaller model"]


def evaluation_size(split: Split, config: LoopConfig, group: str | None) -> str:
    """How large the largest batch of an evaluation is, in words.

    Args:
        split: that is evaluated.
        config: of the training.
        group: what batches cannot cut (`Network.group`).
    """
    return f"its largest batch has {step_size(split, [_largest_batch(split, config.evaluation_batch_size, group)])}"


def smaller_evaluation(split: Split, config: LoopConfig, group: str | None) -> str:
    """What an evaluation needs less memory with, in words; arguments as of `evaluation_size`."""
    largest = _largest_batch(split, config.evaluation_batch_size, group)
    fewer = max(1, len(largest) // 2)
    if len(_largest_batch(split, fewer, group)) < len(largest):
        return f"--set evaluation_batch_size={fewer} (now {config.evaluation_batch_size})"
    return "a smaller model, in a new run"


def _largest_batch(split: Split, size: int, group: str | None) -> Tensor:
    """The samples of the batch that takes most room when padded."""

    def room(indices_b: Tensor) -> int:
        lengths = [lengths_n[indices_b.numpy()] for lengths_n in split.lengths.values()]
        return len(indices_b) * sum(int(lengths_b.max()) for lengths_b in lengths)

    return max(sorted_batches(split, size, group), key=room)

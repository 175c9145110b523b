"""The sizes at which threads and forks are tested are large enough for the kernels to share the work among threads.

torch's parallel_for hands out what is more than a grain. The grains are read from the sources, and the sizes from the
calls of the dispatcher's operators.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import run_forked_calls
import test_threads
from public_calls import CALLS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
OF_TORCH = {"grad_reverse", "pack_and_unpack", "linear", "divergences"}  # calls no operator of the library


def constant(path: str, name: str) -> int:
    found = re.search(rf"constexpr int64_t {name} = (\d+);", (ROOT / path).read_text())
    assert found is not None, f"{path} has no {name}"
    return int(found[1])


DROPOUT_ENTRIES = constant("kernels/cpu/dropout.h", "kEntries")
FEWEST_SUMMED_ROWS = constant("kernels/cpu/dropout.h", "kFewest")
SOFT_TOPK_ENTRIES = constant("kernels/cpu/soft_topk.h", "kEntries")
PERTURBED_ENTRIES = constant("csrc/perturbation.cpp", "kFewest")
CHUNK = constant("kernels/cpu/perturbation.h", "kPerturbationChunk")


class Operators(TorchDispatchMode):
    """The operators of the library that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "mmer_fast":
            self.calls.append((function._schema.name.removeprefix("mmer_fast::"), args))
        return function(*args, **(kwargs or {}))


def shares_rows(x: Tensor, entries: int) -> bool:
    return x.shape[0] > max(entries // x.shape[1], 1)


def shares_chunks(tensors: list[Tensor]) -> bool:
    chunks = sum(-(-x.numel() // CHUNK) for x in tensors)
    per_chunk = sum(x.numel() for x in tensors) // chunks
    return chunks > max(PERTURBED_ENTRIES // per_chunk, 1)


def is_split(operator: str, first: Any) -> bool:
    """Whether a call has more tasks than a grain. Attention's are heads and samples, a task each."""
    if operator == "dropout":
        return first.numel() > DROPOUT_ENTRIES
    if operator in ("relu_dropout_backward", "dropout_add_layer_norm_backward"):
        return first.shape[0] > FEWEST_SUMMED_ROWS
    if operator in ("relu_dropout", "dropout_add_layer_norm"):
        return shares_rows(first, DROPOUT_ENTRIES)
    if operator in ("soft_topk_forward", "soft_topk_backward"):
        return shares_rows(first, SOFT_TOPK_ENTRIES)
    if operator in ("attention_forward", "attention_backward", "self_attention_backward"):
        return first.shape[1] > 1
    if operator in ("grad_norm", "perturb_", "restore_"):
        return shares_chunks(first)
    raise AssertionError(f"how does {operator} share its work?")


@pytest.mark.parametrize("size", [test_threads.SIZE, test_threads.LARGE, run_forked_calls.SIZE])
@pytest.mark.parametrize("name", sorted(CALLS.keys() - OF_TORCH))
def test_threads_share_the_work(name: str, size: int) -> None:
    with Operators() as operators:
        CALLS[name](size)
    assert operators.calls
    serial = [operator for operator, args in operators.calls if not is_split(operator, args[0])]
    assert not serial


@pytest.mark.parametrize("name", sorted(OF_TORCH))
def test_the_others_are_of_torch(name: str) -> None:
    with Operators() as operators:
        CALLS[name](test_threads.SIZE)
    assert not operators.calls

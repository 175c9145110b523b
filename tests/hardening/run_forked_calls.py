"""Makes all calls in this process, on several threads of torch, and then in forked ones; ends with 0 if they agree.

    python run_forked_calls.py loader|fork

A process of its own, since what may go wrong after a fork is that it never ends.
"""

from __future__ import annotations

import os
import sys

import torch
from public_calls import CALLS, same_bits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SIZE = 128


class Results(Dataset):
    """Item i is what the calls give in the process that asks."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, list[Tensor]]:
        return {name: call(SIZE) for name, call in CALLS.items()}


def agree(results: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> bool:
    return results.keys() == expected.keys() and all(same_bits(results[name], expected[name]) for name in expected)


def from_workers(expected: dict[str, list[Tensor]]) -> bool:
    """Twice: workers are forked again for the second epoch, and the parent calls in between."""
    loader = DataLoader(Results(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    agreed = []
    for _ in range(2):
        agreed += [agree(results, expected) for results in loader]
        agreed.append(agree(Results()[0], expected))
    return len(agreed) == 14 and all(agreed)


def from_a_fork(expected: dict[str, list[Tensor]]) -> bool:
    """A bare fork, which like a worker must leave torch one thread before the first call."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if agree(Results()[0], expected) else 1)
    return os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    torch.set_num_threads(2)  # a pool that the forked process does not have
    before = Results()[0]
    sys.exit(0 if {"loader": from_workers, "fork": from_a_fork}[sys.argv[1]](before) else "results differ after a fork")

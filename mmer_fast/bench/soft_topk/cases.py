"""A case of soft top-k, and its inputs.

Scores are logistic(normal), as the temporal scores of RobMMR are (Eq. 6): there 200 Sinkhorn iterations do converge at
epsilon = 0.1 in float32, so that peers are compared where they are right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = 0.4  # k / n, RobMMR section 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """`rows` rows of `n` scores of `dtype`, of which `k` are chosen at `epsilon`; without `k` a share of 0.4.

    `ragged`: lengths drawn from 1..n (about 50 % padding), and the same share of each row's own length as k is of n.
    """

    name: str
    rows: int
    n: int
    k: int | None = None
    epsilon: float = 0.1
    dtype: str = "float32"
    ragged: bool = False


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case on its device.

    Attributes:
        scores: (rows, n), in the dtype of the case.
        k: an int, or (rows,) float32 where rows are ragged.
        lengths: (rows,) int64, or None.
        grad: (rows, n), dL/dT, in the dtype of the case.
        valid_entries: entries inside the lengths, rows * n without.
    """

    scores: Tensor
    k: int | Tensor
    lengths: Tensor | None
    grad: Tensor
    valid_entries: int


def build(case: Case, device: str, seed: int = 0) -> Inputs:
    """The inputs of `case`: drawn on the CPU, so that every device gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    scores = torch.randn(case.rows, case.n, generator=generator).sigmoid().to(device, dtype)
    grad = torch.randn(case.rows, case.n, generator=generator).to(device, dtype)
    if not case.ragged:
        k_of_all = math.floor(SHARE * case.n) if case.k is None else case.k
        return Inputs(scores, k_of_all, None, grad, scores.numel())
    lengths = torch.randint(1, case.n + 1, (case.rows,), generator=generator)
    share = SHARE if case.k is None else case.k / case.n
    k = share * lengths.to(torch.float32)
    return Inputs(scores, k.to(device), lengths.to(device), grad, int(lengths.sum()))

"""A process of test_perturbation_halves.py: steps of half weights on the CPU against float64, bit for bit.

Prints how many entries were compared, how many lay within an ulp of float32 of a tie, and the ones that differ.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from mmer_fast import _extension
from mmer_fast.ops import perturb_

HALVES = (torch.bfloat16, torch.float16)
EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # all bits of a half


def gradients(weights: Tensor, factor: float, dtype: torch.dtype) -> Iterator[Tensor]:
    """Any bits; steps as large as the weights; steps that cancel them; steps that end at a tie or beside one, no more
    than one in 16, since double computes all that are in one register with a tie.
    """
    n = len(weights)
    if dtype == torch.float32:
        yield torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64).to(torch.int32).view(dtype)
    else:
        yield EVERY[torch.randperm(n)].view(dtype)
    wide = weights.double()
    yield (wide * torch.randn(n) / factor).to(dtype)
    yield (-wide * (1 + 2.0**-7 * torch.randn(n)) / factor).to(dtype)
    i = torch.arange(n)
    for _ in range(8):
        target = (wide * (2.2 * torch.rand(n) + 0.34)).to(weights.dtype)
        beside = (target.view(torch.int16) + 1).view(weights.dtype)  # one unit further from zero
        tie = (target.double() + beside.double()) / 2
        yield torch.where(i % 16 == i // 16 % 16, (tie - wide) / factor, 0.0).to(dtype)


def main() -> None:
    torch.manual_seed(0)
    entries, ties, wrong = 0, 0, []
    # Two that float32 rounds as far as it can, down and up; some beyond what is done in float.
    factors = (1 + 0.999 * 2.0**-24, 1 + 1.001 * 2.0**-24, 0.37, 3.7e-3, 1e5, 2.0**-101, 1e31)
    for weight_dtype, grad_dtype, factor in itertools.product(HALVES, (*HALVES, torch.float32), factors):
        weights = EVERY.view(weight_dtype)
        for kind, grad in enumerate(gradients(weights, factor, grad_dtype)):
            moved = {}
            for backend in ("cpu", "reference"):
                moved[backend], stash = weights.clone(), torch.empty_like(weights)
                norms = torch.ones((), dtype=torch.float64)
                perturb_([moved[backend]], [grad], [stash], factor, norms=norms, backend=backend)
                assert torch.equal(stash.view(torch.int16), weights.view(torch.int16))
            got, expected = moved["cpu"], moved["reference"]
            exact = weights.double() + factor * grad.double()
            # What is left where a step undoes a weight is float64's own rounding, with or without a fused product.
            undone = exact.abs() <= 2.0**-45 * weights.double().abs()
            both_nan = got.isnan() & expected.isnan()
            differs = (got.view(torch.int16) != expected.view(torch.int16)) & ~both_nan & ~undone
            dropped = 16 if weight_dtype == torch.bfloat16 else 13
            low = exact.float().view(torch.int32) & ((1 << dropped) - 1)
            entries += len(weights)
            ties += int(((low - (1 << (dropped - 1))).abs() <= 1).sum())
            for i in differs.nonzero()[:3, 0].tolist():
                case = f"{weight_dtype}, {grad_dtype}, factor {factor:g}, gradients {kind}"
                wrong.append(f"{case}: {weights[i]:g} moved by {grad[i]:g} became {got[i]:g}, expected {expected[i]:g}")
    print(json.dumps({"isa": _extension.cpu_isa(), "entries": entries, "ties": ties, "wrong": wrong}))


if __name__ == "__main__":
    main()

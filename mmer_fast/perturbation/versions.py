"""Version counters of perturbed parameters, by which autograd knows whether a saved weight is still the weight.

Before, inside and after a perturbation a parameter holds w, w' and w again. Its counter says so: inside it stands at a
number of its own, and afterwards where it stood before. So a graph that was built before runs backward afterwards
without complaint, while one that crosses a border (built inside and run afterwards, or built before and run inside)
is refused, instead of mixing gradients of w with those of w'.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

# Counters are 32 bits wide and ordinary ones stay small: the upper half is for perturbations, 128 numbers each, so that
# changes inside of one do not look like the next one.
_FIRST, _EACH = 2**31, 128
_serial = itertools.count()
_set = getattr(torch._C._autograd, "_unsafe_set_version_counter", None)


def next_number() -> int:
    """The version of what a new perturbation makes of its parameters."""
    return _FIRST + _EACH * (next(_serial) % (2**31 // _EACH - 1))


def write(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    if _set is not None:
        _set(tuple(tensors), tuple(versions))
    else:  # a torch without the setter: autograd refuses what it cannot be sure of
        torch.autograd.graph.increment_version(tensors)

"""What a contestant of attention is, and ours.

A contestant's `attend` is called once a case with its inputs and prepares what does not depend on leaves (masks,
layouts); what it returns is timed: ``(q, k, v, m) -> o``, padded (B, H, L, D) and (B, L), or packed (total, H, D) and
(total,) where the contestant says so. Only contestants of one task are compared with each other.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

import mmer_fast as mf
from mmer_fast.bench.attention.cases import Case, Inputs

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

# The tasks: no key weights; constant ones; ones whose gradient dL/dm is wanted beside those of q, k and v.
PLAIN, WEIGHTS, WEIGHT_GRADIENT = "no weights", "weights", "weight gradient"


@dataclass(frozen=True)
class Contestant:
    """One row of the tables.

    Attributes:
        task: `PLAIN`, `WEIGHTS` or `WEIGHT_GRADIENT`.
        attend: see the module's docstring.
        backend: the backend of mmer_fast, for our own.
        packed: whether it works on packed tokens.
        padded, dense: whether it is for batches with padding, and for those without.
        square: how many (B, H, L, L) matrices of q's dtype it holds at once, about.
        compiled: its call compiles, once for each case and pass: its forward pass is left out to save that time.
        module: the Python module that must be importable, its distribution's name in `package`.
    """

    name: str
    task: str
    attend: Callable[[Inputs], Attend]
    backend: str | None = None
    packed: bool = False
    padded: bool = True
    dense: bool = True
    square: int = 0
    compiled: bool = False
    module: str | None = None
    package: str | None = None
    devices: tuple[str, ...] = ("cpu",)

    def serves(self, case: Case) -> bool:
        return self.padded if case.padded else self.dense

    def reason(self) -> str | None:
        """Why this contestant cannot run here, or None."""
        if self.backend is not None:
            state = mf.backends()["masked_attention"][self.backend]
            if state != "available":
                return f"not available: {state}"
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return "not installed"
        return None


def attend_ours(backend: str, packed: bool, inputs: Inputs) -> Attend:
    if packed:
        layout = inputs.layout

        def attend_packed(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
            out = mf.packed_attention(
                q, k, v, layout.cu_seqlens, max_seqlen_q=layout.max_seqlen, key_weights=m, backend=backend
            )
            assert isinstance(out, Tensor)
            return out

        return attend_packed
    lengths = inputs.lengths if inputs.padded else None

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        out = mf.masked_attention(q, k, v, m, lengths=lengths, query_lengths=lengths, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return attend


def ours(backend: str, device: str) -> tuple[Contestant, ...]:
    """Those of one backend."""
    name = f"mmer_fast {backend}"

    def one(suffix: str, task: str, packed: bool) -> Contestant:
        attend = partial(attend_ours, backend, packed)
        return Contestant(name + suffix, task, attend, backend=backend, packed=packed, devices=(device,))

    return (
        one("", PLAIN, False),
        one(", packed", PLAIN, True),
        one(", weights", WEIGHTS, False),
        one(", weight gradient", WEIGHT_GRADIENT, False),
        one(", packed, weight gradient", WEIGHT_GRADIENT, True),
    )


def base_of(contestant: Contestant, active: list[Contestant]) -> Contestant:
    """Ours with which a contestant is compared: the first of `active` that solves the same task in the same layout.

    Ours is compared with the first of ours on padded tensors. Constant weights are compared with those that have a
    gradient: their ratio says what the gradient costs. Where ours of the task takes no part, any of ours serves.
    """
    task = WEIGHT_GRADIENT if contestant.task == WEIGHTS else contestant.task
    packed = contestant.packed and contestant.backend is None
    mine = [c for c in active if c.backend is not None]
    same_task = [c for c in mine if c.task == task]
    return ([c for c in same_task if c.packed == packed] or same_task or mine)[0]

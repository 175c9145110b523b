"""The contestants: mmer_fast, yardsticks of torch, pure-PyTorch baselines, and packages that exist.

A contestant's function is ``(scores (R, n), k, epsilon, lengths) -> Tensor``. A package that is not installed gives a
row that says so. `relaxation` keeps apart what can be compared in value ("same plan") from what solves the same need
with another function.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast.bench import harness
from mmer_fast.bench.soft_topk import baselines
from mmer_fast.bench.soft_topk.cases import Case

Function = Callable[[Tensor, "int | Tensor", float, "Tensor | None"], Tensor]

SAME_PLAN, OTHER, YARDSTICK = "same plan", "another function", "yardstick"


@dataclass(frozen=True)
class Contestant:
    """One row of the tables.

    Attributes:
        load: makes the function; called once a case, after the checks of `reason`.
        backend: the backend of mmer_fast, for our own.
        module: the Python module that must be importable, its distribution's name in `package`.
        ragged: whether it serves rows of different lengths.
        differentiable: whether forward + backward makes sense.
        saved_floats: floats that autograd keeps for each entry, where that is what limits the size.
    """

    name: str
    relaxation: str
    load: Callable[[], Function]
    backend: str | None = None
    module: str | None = None
    package: str | None = None
    ragged: bool = True
    differentiable: bool = True
    saved_floats: int = 0
    devices: tuple[str, ...] = ("cpu", "cuda")

    def reason(self, case: Case) -> str | None:
        """Why this contestant cannot take part in `case`, or None."""
        if self.backend is not None:
            state = mf.backends()["soft_topk"][self.backend]
            if state != "available":
                return f"not available: {state}"
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return "not installed"
        if case.ragged and not self.ragged:
            return "no ragged rows"
        return None


def _ours(backend: str) -> Function:
    def soft_topk(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
        weights = mf.soft_topk(scores, k, epsilon=epsilon, lengths=lengths, backend=backend)
        assert isinstance(weights, Tensor)
        return weights

    return soft_topk


def _copy() -> Function:
    return lambda scores, k, epsilon, lengths: scores.clone()


def _sigmoid() -> Function:
    return lambda scores, k, epsilon, lengths: torch.sigmoid(scores)


def _topk() -> Function:
    """The bare call, which is less work than the hard mask that would be made from its indices."""

    def topk(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
        assert isinstance(k, int)
        return torch.topk(scores, k).values

    return topk


def _newton_compiled() -> Function:
    return torch.compile(baselines.newton, dynamic=False, fullgraph=True)


def _pot(max_iter: int, tol: float) -> Function:
    from ot.batch import solve_batch

    def pot(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
        cost, a, b, n = baselines.problem(scores, k, lengths)
        mode = "autodiff" if scores.requires_grad else "detach"
        solution = solve_batch(cost, epsilon, a, b, max_iter=max_iter, tol=tol, method="log_sinkhorn", grad=mode)
        return (solution.plan[..., 1] * n).to(scores.dtype)

    return pot


def _geomloss(max_iter: int) -> Function:
    from geomloss import ot

    def geomloss(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
        cost, a, b, n = baselines.problem(scores, k, lengths)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar", UserWarning)
            solution = ot.solve_batch(cost, reg=epsilon, a=a, b=b.contiguous(), max_iter=max_iter)
        return (solution.plan[..., 1] * n).to(scores.dtype)

    return geomloss


def _entmax() -> Function:
    from entmax import budget_bisect

    def entmax(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
        return budget_bisect(scores.float() * (2 / epsilon), k, n_iter=24).to(scores.dtype)

    return entmax


def _colt5() -> Function:
    from colt5_attention import coor_descent

    def colt5(scores: Tensor, k: int | Tensor, epsilon: float, lengths: Tensor | None) -> Tensor:
        mask = None if lengths is None else torch.arange(scores.shape[-1], device=scores.device) < lengths[:, None]
        return coor_descent(scores.float(), n_iters=50, k=k, eps=epsilon / 2, mask=mask).to(scores.dtype)

    return colt5


_UNROLLED = 6 * baselines.SINKHORN_ITERATIONS  # saved floats an entry and iteration: two plans' sums, both columns

CONTESTANTS = (
    Contestant("mmer_fast cpu", SAME_PLAN, partial(_ours, "cpu"), backend="cpu", devices=("cpu",)),
    Contestant("mmer_fast cuda", SAME_PLAN, partial(_ours, "cuda"), backend="cuda", devices=("cuda",)),
    Contestant("mmer_fast triton", SAME_PLAN, partial(_ours, "triton"), backend="triton", devices=("cuda",)),
    Contestant("copy", YARDSTICK, _copy, differentiable=False),
    Contestant("torch.sigmoid", YARDSTICK, _sigmoid),
    Contestant("torch.topk", YARDSTICK, _topk, ragged=False),
    Contestant("Newton, torch.compile", SAME_PLAN, _newton_compiled),
    Contestant("Newton, eager", SAME_PLAN, lambda: baselines.newton),
    Contestant("Sinkhorn-200 exp, implicit", SAME_PLAN, lambda: baselines.sinkhorn_exp_implicit),
    Contestant("Sinkhorn-200 log, implicit", SAME_PLAN, lambda: baselines.sinkhorn_log_implicit),
    Contestant("Sinkhorn-200 log, autograd", SAME_PLAN, lambda: baselines.sinkhorn_log, saved_floats=_UNROLLED),
    Contestant(
        "POT, default tolerance",
        SAME_PLAN,
        partial(_pot, 200, 1e-5),
        module="ot",
        package="POT",
        saved_floats=_UNROLLED,
    ),
    Contestant(
        "POT, 200 iterations",
        SAME_PLAN,
        partial(_pot, 200, 0.0),
        module="ot",
        package="POT",
        saved_floats=_UNROLLED,
    ),
    Contestant(
        "geomloss, 200 iterations",
        SAME_PLAN,
        partial(_geomloss, 200),
        module="geomloss",
        package="geomloss",
        saved_floats=_UNROLLED,
    ),
    Contestant(
        "CoLT5 coor_descent",
        OTHER,
        _colt5,
        module="colt5_attention",
        package="colt5-attention",
        saved_floats=500,
    ),
    Contestant("entmax budget_bisect", OTHER, _entmax, module="entmax", package="entmax", ragged=False),
)


def select(device: str, names: list[str] | None = None) -> list[Contestant]:
    """The contestants of a device type; with `names`, those whose name contains one of them.

    Ours and the copy always take part, but where `names` picks among ours the others of ours stay out.

    Raises:
        ValueError: a name that fits no contestant.
    """
    pool = [contestant for contestant in CONTESTANTS if device in contestant.devices]
    ours = {c.name for c in pool if c.backend is not None}
    chosen = harness.select([c.name for c in pool], ours, {"copy"}, names)
    return [contestant for contestant in pool if contestant.name in chosen]

"""What a contestant of the weight perturbation is, and ours.

A contestant's `prepare` is called once a case with parameters of its own, and makes what a training loop would keep;
what it returns is a cycle: it perturbs, calls `inside`, and restores.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import mmer_fast as mf
from mmer_fast.bench.perturbation.cases import Case, Problem

Cycle = Callable[[Callable[[], object]], None]


@dataclass(frozen=True)
class Contestant:
    """One row of the tables.

    Attributes:
        backend: the backend of mmer_fast, for our own.
        scopes: the norm scopes that it serves.
        adaptive: whether it serves the adaptive step as well as the plain one.
        yardstick: whether it does something else, for scale: nothing is checked.
        module: the Python module that must be importable, its distribution's name in `package`.
    """

    name: str
    prepare: Callable[[Problem], Cycle]
    backend: str | None = None
    scopes: tuple[str, ...] = ("global",)
    adaptive: bool = False
    yardstick: bool = False
    module: str | None = None
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    def serves(self, case: Case) -> bool:
        return case.scope in self.scopes and (self.adaptive or not case.adaptive)

    def reason(self) -> str | None:
        """Why this contestant cannot run here, or None."""
        if self.backend is not None:
            state = mf.backends()["perturbation"][self.backend]
            if state != "available":
                return f"not available: {state}"
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return "not installed"
        return None


def perturbed(backend: str, problem: Problem) -> Cycle:
    """As a training loop has it."""
    parameters, radius = problem.parameters, problem.radius
    scope, adaptive = problem.scope, problem.adaptive

    def cycle(inside: Callable[[], object]) -> None:
        with mf.perturbed(parameters, radius, scope=scope, adaptive=adaptive, backend=backend):
            inside()

    return cycle


def bare_operators(backend: str, problem: Problem) -> Cycle:
    """The operators over lists and a stash that the caller keeps."""
    parameters, grads, radius = problem.parameters, problem.grads, problem.radius
    scope, adaptive = problem.scope, problem.adaptive
    stash = [torch.empty_like(parameter, requires_grad=False) for parameter in parameters]

    def cycle(inside: Callable[[], object]) -> None:
        mf.ops.perturb_(parameters, grads, stash, radius, scope=scope, adaptive=adaptive, backend=backend)
        inside()
        mf.ops.restore_(parameters, stash, backend=backend)

    return cycle


def cuda_graphs(backend: str, problem: Problem) -> Cycle:
    """The bare operators in two CUDA graphs, as in a training step that is captured: what the kernels alone take."""
    parameters, grads, radius = problem.parameters, problem.grads, problem.radius
    scope, adaptive = problem.scope, problem.adaptive
    stash = [torch.empty_like(parameter, requires_grad=False) for parameter in parameters]

    def perturb() -> None:
        mf.ops.perturb_(parameters, grads, stash, radius, scope=scope, adaptive=adaptive, backend=backend)

    def restore() -> None:
        mf.ops.restore_(parameters, stash, backend=backend)

    perturb()  # compiles, and makes what is made once
    restore()
    captured = []
    for step in (perturb, restore):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        captured.append((graph, step))  # a graph has bare addresses: the step keeps what is there

    def cycle(inside: Callable[[], object]) -> None:
        captured[0][0].replay()
        inside()
        captured[1][0].replay()

    return cycle


def ours(backend: str, device: str) -> tuple[Contestant, ...]:
    """Those of one backend."""

    def one(suffix: str, prepare: Callable[[str, Problem], Cycle]) -> Contestant:
        return Contestant(
            f"mmer_fast {backend}{suffix}",
            partial(prepare, backend),
            backend=backend,
            scopes=("global", "tensor"),
            adaptive=True,
            devices=(device,),
        )

    contestants = (one("", perturbed), one(", bare operators", bare_operators))
    return contestants + ((one(", CUDA graphs", cuda_graphs),) if device == "cuda" else ())

"""Measures the training step: gates every contestant on the gradients of Algorithm 1 in float64, then times steps.

The gate is in evaluation mode, where no numbers are drawn; the time is taken in training mode. The error of a
contestant is that of all its gradients together, relative to their norm; where it exceeds the limit, the median of
that and two further draws counts: a ReLU whose argument is zero to rounding moves all gradients of one draw by 1e-4,
while what is wrong is wrong in each. The floor of the roofline is, for
every contestant, that of the FLOP of the fast step that has the fewest (`work`), at the rate of the quickest product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.training_step import cases, memory, split, work
from benchmarks.training_step.cases import STEP, Case, Inputs
from benchmarks.training_step.contestants import FAST, Contestant, Step
from mmer_fast.bench import ceilings, harness, timing
from mmer_fast.bench.harness import OK, Row, WrongResultError
from mmer_fast.bench.roofline import Rates, roofline
from mmer_fast.ops.linear import has_bfloat16_products
from mmer_fast.training.algorithm1 import Algorithm1

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.15}  # bfloat16: as far off as the textbook step under autocast
PEER_TOLERANCE = 2e-2  # 100 Sinkhorn iterations do not end where Newton does
MOST_ROUNDS = 5  # a step takes seconds
_PRODUCT = "rate of a product, "  # takes its turns too


@dataclass(frozen=True)
class Entry:
    """A contestant that takes part: one step, its seconds, the error of its gradients."""

    contestant: Contestant
    call: Callable[[], None]
    seconds: float
    gradient_error: float


def gradients(step: Step, inputs: Inputs, first_steps: int = 0) -> Tensor:
    """All gradients in evaluation mode, end to end, float64; of the step that follows `first_steps` others."""
    inputs.model.eval()
    for _ in range(first_steps + 1):
        inputs.model.zero_grad()
        step.accumulate_gradients(inputs.batch)
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in inputs.model.parameters()]
    inputs.model.zero_grad()
    inputs.model.train()
    return torch.cat([gradient.double().flatten() for gradient in flat])


def solve_reference(inputs: Inputs) -> Tensor:
    """The gradients of `Algorithm1` in float64."""
    batch = replace(
        inputs.batch,
        features={name: x.double() for name, x in inputs.batch.features.items()},
        labels=inputs.batch.labels.double(),
    )
    wide = replace(inputs, model=copy.deepcopy(inputs.model).double(), batch=batch)
    return gradients(Algorithm1(wide.model, wide.config), wide)


def gradient_error(contestant: Contestant, inputs: Inputs, truth: Tensor) -> float:
    found = gradients(contestant.step(inputs), inputs, contestant.first_steps)
    return float((found - truth).norm() / truth.norm())


def median_error(contestant: Contestant, case: Case, device: str, first: float) -> float:
    """The median error of three draws of the case, of which the `first` is known; NaN if one is."""
    draws = [cases.build(case, device, seed) for seed in (1, 2)]
    errors = [first, *(gradient_error(contestant, draw, solve_reference(draw)) for draw in draws)]
    return float(torch.tensor(errors, dtype=torch.float64).median())


def enter(contestant: Contestant, case: Case, inputs: Inputs, truth: Tensor) -> Entry | str:
    """Checks and warms up a contestant; or says why it does not take part.

    Raises:
        WrongResultError: ours raised, or is wrong.
    """
    where = f"{contestant.name}, {case.name}"
    if contestant.bfloat16 and truth.device.type == "cpu" and not has_bfloat16_products():
        return "left out: this CPU has no fast products of bfloat16"  # a step takes ten times float32's
    try:
        error = gradient_error(contestant, inputs, truth)
        limit = TOLERANCES["bfloat16" if contestant.bfloat16 else "float32"] if contestant.ours else PEER_TOLERANCE
        if not error <= limit:
            error = median_error(contestant, case, truth.device.type, error)
        call = contestant.prepare(inputs)
        _, seconds = timing.time_once(call, truth.device.type)
    except Exception as problem:
        if contestant.ours and not contestant.may_fail:
            raise WrongResultError(f"{where}: raised {harness.brief(problem)}") from problem
        return f"unsupported: {harness.brief(problem)}"
    if not error <= limit:
        if contestant.ours:
            raise WrongResultError(f"{where}: expected an error of the gradients within {limit:g}, got {error:.3g}")
        return f"wrong: error {error:.2g} of the gradients"
    return Entry(contestant, call, seconds, error)


def measure(case: Case, contestants: list[Contestant], device: str, plan: timing.Plan) -> list[Row]:
    """The rows of a case.

    Raises:
        WrongResultError: a result of ours is wrong.
    """
    inputs = cases.build(case, device)
    truth = solve_reference(inputs)
    pool = [contestant for contestant in contestants if contestant.serves(case)]
    entries = {c.name: enter(c, case, inputs, truth) for c in pool}
    active = {name: entry for name, entry in entries.items() if isinstance(entry, Entry)}
    base = FAST if FAST in active else next(name for name, entry in active.items() if entry.contestant.ours)
    calls = {name: entry.call for name, entry in active.items()}
    seconds = {name: entry.seconds for name, entry in active.items()}
    rounds = min(plan.rounds, MOST_ROUNDS)
    slowest = 2 * max(seconds.values()) * rounds
    patient = replace(plan, rounds=rounds, budget_s=max(plan.budget_s, slowest if plan.rounds > rounds else 0.0))
    products = ceilings.matrix_products(ceilings.MATMUL_DTYPES[device], device)
    calls |= {f"{_PRODUCT}{dtype}": call for dtype, call in products.items()}
    seconds |= {f"{_PRODUCT}{dtype}": 0.0 for dtype in products}
    timings = timing.interleave(calls, seconds, patient, device)
    top = ceilings.quickest_product({dtype: timings[f"{_PRODUCT}{dtype}"].median() for dtype in products}, device)
    counted = [work.count(entry.call) for entry in active.values() if entry.contestant.ours]
    floor = min((done for done in counted if done.flops > 0), key=lambda done: done.flops)  # 0: a replay hides them

    rows = []
    for contestant in pool:
        row = {
            "operator": "training_step",
            "case": case.name,
            "samples": case.samples,
            "dropout": case.dropout,
            "padding": inputs.padding,
            "parameters": sum(p.numel() for p in inputs.model.parameters()),
            "device": device,
            "pass": STEP,
            "contestant": contestant.name,
            "ours": contestant.ours,
        }
        entry = entries[contestant.name]
        if isinstance(entry, str):
            rows.append(row | {"status": entry})
            continue
        row |= {"status": OK, "gradient_error": entry.gradient_error, "base": base}
        row |= {"split": split.split(entry.call, device), "peak_bytes": memory.peak_bytes(case, contestant, inputs)}
        own = timings[contestant.name]
        row |= {"gflops": floor.flops / own.median() * 1e-9, **top}
        row |= roofline(floor, Rates(gflops=top["mm_gflops"]), own.median())
        rows.append(row | harness.figures(own, timings[base]))
    return rows


def show(rows: list[Row]) -> None:
    """Prints the rows of a case."""
    first = rows[0]
    print(
        f"\n{first['case']}  {first['samples']} samples, {100 * first['padding']:.0f} % padding, dropout "
        f"{first['dropout']:g}, {first['parameters']} parameters  {STEP}"
    )
    print(f"  {'':34}{'ms':>9}{'of roof':>8}{'x ours':>8}  {'(rounds)':16}{'error':>8}{'peak, MiB':>11}")
    for row in rows:
        name = f"{row['contestant']:34}"
        if row["status"] != OK:
            print(f"  {name}{row['status']}")
            continue
        spread = f"({row['ratio_min']:.3g}..{row['ratio_max']:.3g})"
        time = f"{row['us'] * 1e-3:9.1f}{row['roofline']:8.2f}{row['ratio']:8.3g}  {spread:16}"
        print(f"  {name}{time}{row['gradient_error']:8.0e}{row['peak_bytes'] / 2**20:11.0f}")
        print(f"    {split.in_words(row['split'])}", flush=True)

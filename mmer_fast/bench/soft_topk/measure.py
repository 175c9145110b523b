"""Measures soft top-k: compares every contestant of the same plan with the float64 reference, then times.

A peer's error is reported beside its time, however large; where ours is wrong the case is not timed and the run fails.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast.bench import counters, harness, timing
from mmer_fast.bench.harness import FORWARD, FORWARD_BACKWARD, OK, NoBackendError, Row, WrongResultError
from mmer_fast.bench.roofline import Rates, Work, roofline
from mmer_fast.bench.soft_topk import cases
from mmer_fast.bench.soft_topk.cases import Case, Inputs
from mmer_fast.bench.soft_topk.peers import SAME_PLAN, Contestant, Function

# Largest |T - T*|, and largest |dL/ds - dL/ds*| over the largest |dL/ds*|, at epsilon = 0.1; bfloat16 rounds T in
# [0.5, 1) by 2^-9. Below it they grow as the slope of T, 1 / epsilon.
TOLERANCES = {"float32": (2e-6, 1e-5), "bfloat16": (2.1e-3, 8e-3)}


# The rates of the roofline take their turns too, on the scores of the case: what fits into a cache has other rates.
_COPY, _SIGMOID = "rate of a copy", "rate of a sigmoid"


@dataclass(frozen=True)
class Entry:
    """A contestant that takes part in a pass: what to call, how long a call took, how wrong it was, what it held."""

    contestant: Contestant
    call: timing.Call
    seconds: float
    value_error: float | None
    gradient_error: float | None
    extra_bytes: int | None


@dataclass(frozen=True)
class Truth:
    """The float64 plan and gradient, (rows, n) each."""

    weights: Tensor
    gradient: Tensor


def solve_reference(case: Case, inputs: Inputs) -> Truth:
    scores = inputs.scores.double().requires_grad_()
    weights = mf.soft_topk(scores, inputs.k, epsilon=case.epsilon, lengths=inputs.lengths, backend="reference")
    assert isinstance(weights, Tensor)
    (gradient,) = torch.autograd.grad(weights, scores, inputs.grad.double())
    return Truth(weights.detach(), gradient)


def make_call(function: Function, case: Case, inputs: Inputs, step: str) -> timing.Call:
    """A call that returns the weights (`FORWARD`), or (weights, dL/ds)."""
    k, epsilon, lengths = inputs.k, case.epsilon, inputs.lengths
    if step == FORWARD:
        scores = inputs.scores
        return lambda: function(scores, k, epsilon, lengths)
    leaf = inputs.scores.clone().requires_grad_()

    def forward_backward() -> tuple[Tensor, Tensor]:
        weights = function(leaf, k, epsilon, lengths)
        # torch.topk returns (rows, k): the gradient of as many entries.
        grad = inputs.grad if weights.shape == inputs.grad.shape else inputs.grad[:, : weights.shape[1]]
        (gradient,) = torch.autograd.grad(weights, leaf, grad)
        return weights, gradient

    return forward_backward


def errors(result: Any, truth: Truth, step: str) -> tuple[float, float | None]:
    """Value and relative gradient error of what a call returned; NaN counts as infinitely wrong."""
    weights, gradient = (result, None) if step == FORWARD else result
    value = float((weights.detach().double() - truth.weights).abs().max().nan_to_num(nan=torch.inf))
    if gradient is None:
        return value, None
    off = (gradient.double() - truth.gradient).abs().max() / truth.gradient.abs().max()
    return value, float(off.nan_to_num(nan=torch.inf))


def check_ours(contestant: Contestant, case: Case, value: float, gradient: float | None) -> None:
    """Raises `WrongResultError` where our own result is off."""
    value_limit, gradient_limit = (limit * max(1.0, 0.1 / case.epsilon) for limit in TOLERANCES[case.dtype])
    if value > value_limit or (gradient is not None and gradient > gradient_limit):
        raise WrongResultError(
            f"{contestant.name}, {case.name}: expected errors within {value_limit:g} (value) and {gradient_limit:g} "
            f"(gradient) of the float64 reference, got {value:.3g} and {gradient or 0.0:.3g}; nothing is timed"
        )


def enter(contestant: Contestant, case: Case, inputs: Inputs, truth: Truth, step: str) -> Entry | str:
    """Loads, warms up and checks a contestant; or says why it does not take part.

    An exception of a peer becomes that reason.

    Raises:
        WrongResultError: ours raised, or is wrong.
    """
    device = inputs.scores.device.type
    reason = contestant.reason(case)
    if reason is not None:
        return reason
    if step == FORWARD_BACKWARD and not contestant.differentiable:
        return "no gradient"
    saved = 4.0 * contestant.saved_floats * inputs.scores.numel()
    if step == FORWARD_BACKWARD and saved > harness.memory_limit(device):
        return f"its graph needs about {saved * 1e-9:.0f} GB"
    try:
        call = make_call(contestant.load(), case, inputs, step)
        result, seconds = timing.time_once(call, device)
        if seconds < 1.0 or contestant.name.endswith("torch.compile"):
            result, seconds = timing.time_once(call, device)  # the first call compiles and allocates
        extra_bytes = counters.extra_bytes(call, seconds, device)
    except Exception as error:
        if contestant.backend is not None:
            raise WrongResultError(f"{contestant.name}, {case.name}: raised {type(error).__name__}: {error}") from error
        return harness.brief(error)
    value = gradient = None
    if contestant.relaxation == SAME_PLAN:
        value, gradient = errors(result, truth, step)
        if contestant.backend is not None:
            check_ours(contestant, case, value, gradient)
    return Entry(contestant, call, seconds, value, gradient, extra_bytes)


def measure(case: Case, contestants: list[Contestant], device: str, plan: timing.Plan) -> list[Row]:
    """The rows of a case: forward, then forward + backward.

    Raises:
        WrongResultError: a result of ours is wrong.
        NoBackendError: no backend of ours can run on this device.
    """
    inputs = cases.build(case, device)
    truth = solve_reference(case, inputs)
    rows = []
    for step in (FORWARD, FORWARD_BACKWARD):
        entries = {c.name: enter(c, case, inputs, truth, step) for c in contestants}
        active = {name: entry for name, entry in entries.items() if isinstance(entry, Entry)}
        base = next((name for name, entry in active.items() if entry.contestant.backend), None)
        if base is None:
            states = mf.backends()["soft_topk"]
            raise NoBackendError(f"no backend of mmer_fast serves {device}: {states}. Build the package first.")
        calls = {name: entry.call for name, entry in active.items()}
        calls |= {_COPY: inputs.scores.clone, _SIGMOID: inputs.scores.sigmoid}
        seconds = {name: entry.seconds for name, entry in active.items()} | {_COPY: 0.0, _SIGMOID: 0.0}
        timings = timing.interleave(calls, seconds, plan, device)
        rates = Rates(
            gbps=2 * _bytes(inputs) / timings[_COPY].median() * 1e-9,
            gsigmoids=inputs.scores.numel() / timings[_SIGMOID].median() * 1e-9,
        )
        for contestant in contestants:
            row = _identity(case, inputs, contestant, step, device)
            entry = entries[contestant.name]
            if isinstance(entry, str):
                rows.append(row | {"status": entry})
            else:
                row |= {
                    "status": OK,
                    "value_error": entry.value_error,
                    "gradient_error": entry.gradient_error,
                    "extra_bytes": entry.extra_bytes,
                }
                own = timings[contestant.name]
                row |= _shares(contestant, inputs, step, rates, own.median())
                rows.append(row | harness.figures(own, timings[base]))
    torch.compiler.reset()
    return rows


def _identity(case: Case, inputs: Inputs, contestant: Contestant, step: str, device: str) -> Row:
    return {
        "operator": "soft_topk",
        "case": case.name,
        "rows": case.rows,
        "n": case.n,
        "k": inputs.k if isinstance(inputs.k, int) else None,
        "epsilon": case.epsilon,
        "dtype": case.dtype,
        "ragged": case.ragged,
        "device": device,
        "pass": step,
        "contestant": contestant.name,
        "relaxation": contestant.relaxation,
        "ours": contestant.backend is not None,
    }


def work(inputs: Inputs, step: str) -> Work:
    """What a call cannot do without (see `roofline`)."""
    read, written = inputs.valid_entries, inputs.scores.numel()
    entries = read + written if step == FORWARD else 3 * read + 2 * written
    return Work(bytes=entries * inputs.scores.element_size(), sigmoids=read)


def _bytes(inputs: Inputs) -> int:
    return inputs.scores.numel() * inputs.scores.element_size()


def _shares(contestant: Contestant, inputs: Inputs, step: str, rates: Rates, seconds: float) -> Row:
    """Bandwidth and its share of a copy's; of those who compute the plan also the share of the roofline."""
    needed = work(inputs, step)
    assert rates.gbps is not None
    gbps = needed.bytes / seconds * 1e-9
    row = {"gbps": gbps, "of_copy": gbps / rates.gbps}
    return row | (roofline(needed, rates, seconds) if contestant.relaxation == SAME_PLAN else {})


def show(rows: list[Row]) -> None:
    """Prints the rows of a case."""
    for step in (FORWARD, FORWARD_BACKWARD):
        print(f"\n{rows[0]['case']}  {rows[0]['dtype']}  {step}")
        print(
            f"  {'':28}{'us':>12}{'GB/s':>9}{'of copy':>9}{'of roof':>9}{'x ours':>9}  {'(rounds)':24}"
            "error value / gradient"
        )
        for row in (row for row in rows if row["pass"] == step):
            if row["status"] != OK:
                print(f"  {row['contestant']:28}{row['status']}")
                continue
            spread = f"({row['ratio_min']:.3g}..{row['ratio_max']:.3g})"
            wrong = " / ".join(f"{e:.0e}" for e in (row["value_error"], row["gradient_error"]) if e is not None)
            roof = f"{row['roofline']:9.3f}" if "roofline" in row else f"{'':9}"
            rates = f"{row['us']:12.1f}{row['gbps']:9.2f}{row['of_copy']:9.3f}{roof}"
            print(f"  {row['contestant']:28}{rates}{row['ratio']:9.3g}  {spread:24}{wrong}")
    sys.stdout.flush()

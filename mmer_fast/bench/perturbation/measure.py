"""Measures the weight perturbation: gates every contestant on the float64 reference, then times cycles.

The gate looks at the weights inside of a cycle, and at their bits and addresses after cycles: ours must give back every
bit, in the same memory; of the others the rows say whether they do. A peer that raises, or moves the weights elsewhere,
is reported with the reason and not timed. GB/s count what a cycle must move, 7 values an entry (g; w, g, w', stash;
stash, w), whatever a contestant really moves. Beside them stands the copy of `ceilings.large_copy`; the floor of the
roofline is at the rate of a copy of as many bytes as the weights have, which may fit into a cache as they do. Both take
their turns like contestants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast.bench import ceilings, counters, harness, timing
from mmer_fast.bench.harness import OK, NoBackendError, Row, WrongResultError
from mmer_fast.bench.perturbation import cases
from mmer_fast.bench.perturbation.cases import CYCLE, Case, Inputs, Problem
from mmer_fast.bench.perturbation.contestants import Contestant, Cycle
from mmer_fast.bench.roofline import Rates, Work, roofline

# Largest error of the perturbed weights, ours and others': about two roundings to their dtype, and what norms in that
# dtype, or in naive float32 sums, cost.
TOLERANCES = {"fp32": (3e-7, 2e-3), "bf16": (1.6e-2, 5e-2), "fp16": (2e-3, 2e-2)}
VALUES = 7  # of an entry that a cycle must read or write
REPEATS = 100  # cycles after which bits are compared
_LARGE_COPY, _OWN_COPY = "rate of a large copy", "rate of a copy"
_BLOCK = 2**16  # entries compared at a time, in the caches


@dataclass(frozen=True)
class Entry:
    """A contestant that takes part.

    Attributes:
        call: one cycle.
        problem: the parameters that it works on.
        value_error: of the perturbed weights; None of a yardstick, as all that follows.
        changed: the share of entries with other bits after `REPEATS` cycles.
        keeps_storage: whether the parameters are still where they were.
        extra_bytes: the most that preparation and a cycle hold above weights and gradients.
        launches: kernels of a cycle; None on the CPU.
    """

    contestant: Contestant
    call: timing.Call
    problem: Problem
    seconds: float
    value_error: float | None = None
    changed: float | None = None
    keeps_storage: bool | None = None
    extra_bytes: int | None = None
    launches: int | None = None


def nothing() -> None:
    """What stands inside of a timed cycle."""


def solve_reference(inputs: Inputs) -> list[Tensor]:
    """The perturbed weights in float64, tensor by tensor: a float64 copy of everything at once may not fit."""
    options: dict[str, Any] = {"scope": inputs.scope, "adaptive": inputs.adaptive, "backend": "reference"}
    norms = mf.ops.grad_norm(inputs.grads, params=inputs.weights if inputs.adaptive else None, **options)
    moved = []
    for i, (w, g) in enumerate(zip(inputs.weights, inputs.grads, strict=True)):
        wide, norm = w.to(torch.float64, copy=True), norms if inputs.scope == "global" else norms[i : i + 1]
        mf.ops.perturb_([wide], [g.double()], [torch.empty_like(wide)], inputs.radius, norms=norm, **options)
        moved.append(wide)
    return moved


def value_error(parameters: Sequence[Tensor], inputs: Inputs, truth: list[Tensor]) -> float:
    """The largest |w' - w'*| / (|w| + |w'* - w|), relative to what was added up; NaN counts as infinitely wrong.

    The smallest normal number is added to the divisor: below it a dtype has digits of an absolute size.
    """
    tiny = torch.finfo(inputs.weights[0].dtype).tiny
    worst = []
    for p, w, expected in zip(parameters, inputs.weights, truth, strict=True):
        flat = (p.detach().flatten(), w.flatten(), expected.flatten())
        for got_n, w_n, expected_n in zip(*(x.split(_BLOCK) for x in flat), strict=True):
            wide = w_n.double()
            total = (expected_n - wide).abs_().add_(wide.abs_()).add_(tiny)
            worst.append((got_n.double() - expected_n).abs_().div_(total).amax())
    return float(torch.stack(worst).nan_to_num(nan=torch.inf).amax())


def changed_after(contestant: Contestant, sample: Inputs, count: int) -> float:
    """The share of entries of a sample that have other bits after `count` cycles."""
    problem = sample.problem()
    cycle = contestant.prepare(problem)
    for _ in range(count):
        cycle(nothing)
    return cases.changed(sample.weights, problem.parameters) / sample.entries


def enter(contestant: Contestant, case: Case, inputs: Inputs, truth: list[Tensor]) -> Entry | str:
    """Prepares, warms up and checks a contestant; or says why it does not take part.

    Raises:
        WrongResultError: ours raised, or is wrong.
    """
    if (reason := contestant.reason()) is not None:
        return reason
    try:
        entry = _checked(contestant, inputs, truth)
    except Exception as error:
        if contestant.backend is not None:
            raise WrongResultError(f"{contestant.name}, {case.name}: raised {harness.brief(error)}") from error
        return f"unsupported: {harness.brief(error)}"
    if contestant.backend is not None:
        check_ours(entry, case)
    elif (entry.value_error or 0.0) > TOLERANCES[case.dtype][1]:
        return f"wrong: error {entry.value_error:.2g} of the perturbed weights"
    return entry


def _checked(contestant: Contestant, inputs: Inputs, truth: list[Tensor]) -> Entry:
    device = inputs.weights[0].device.type
    if contestant.yardstick:
        problem = inputs.problem()
        cycle = contestant.prepare(problem)
        cycle(nothing)
        _, seconds = timing.time_once(lambda: cycle(nothing), device)
        return Entry(contestant, lambda: cycle(nothing), problem, seconds)
    changed = changed_after(contestant, inputs.sample(), REPEATS)
    (problem, addresses, cycle), peak = counters.with_peak_bytes(lambda: _first_cycle(contestant, inputs), device)
    errors: list[float] = []
    cycle(lambda: errors.append(value_error(problem.parameters, inputs, truth)))
    seconds = min(timing.time_once(lambda: cycle(nothing), device)[1] for _ in range(2))
    return Entry(
        contestant,
        lambda: cycle(nothing),
        problem,
        seconds,
        value_error=errors[0],
        changed=changed,
        keeps_storage=[p.data_ptr() for p in problem.parameters] == addresses,
        extra_bytes=peak - inputs.bytes,
        launches=counters.launches(lambda: cycle(nothing), device),
    )


def _first_cycle(contestant: Contestant, inputs: Inputs) -> tuple[Problem, list[int], Cycle]:
    """New parameters, their addresses before anything, and a cycle that has run once."""
    problem = inputs.problem()
    addresses = [p.data_ptr() for p in problem.parameters]
    cycle = contestant.prepare(problem)
    cycle(nothing)
    return problem, addresses, cycle


def check_ours(entry: Entry, case: Case) -> None:
    """Raises `WrongResultError` where ours is off, or does not give the weights back as they were."""
    name, limit = f"{entry.contestant.name}, {case.name}", TOLERANCES[case.dtype][0]
    assert entry.value_error is not None
    if entry.value_error > limit:
        raise WrongResultError(
            f"{name}: expected errors of the perturbed weights within {limit:g} of the float64 reference, got "
            f"{entry.value_error:.3g}; nothing is timed"
        )
    if entry.changed or not entry.keeps_storage:
        what = f"{100 * entry.changed:.3g} % of the bits changed" if entry.changed else "other memory"
        raise WrongResultError(f"{name}: expected the same bits in the same memory, got {what}; nothing is timed")


def measure(case: Case, contestants: list[Contestant], device: str, plan: timing.Plan) -> list[Row]:
    """The rows of a case.

    Raises:
        WrongResultError: a result of ours is wrong.
        NoBackendError: no backend of ours can run on this device.
    """
    inputs = cases.build(case, device)
    truth = solve_reference(inputs)
    pool = [contestant for contestant in contestants if contestant.serves(case)]
    entries = {c.name: enter(c, case, inputs, truth) for c in pool}
    del truth
    active = {name: entry for name, entry in entries.items() if isinstance(entry, Entry)}
    base = next((name for name, entry in active.items() if entry.contestant.backend), None)
    if base is None:
        states = mf.backends()["perturbation"]
        raise NoBackendError(f"no backend of mmer_fast serves {device}: {states}. Build the package first.")
    copy, copied = ceilings.large_copy(device)
    calls = {name: entry.call for name, entry in active.items()} | {_LARGE_COPY: copy, _OWN_COPY: own_copy(inputs)}
    seconds = {name: entry.seconds for name, entry in active.items()} | {_LARGE_COPY: 0.0, _OWN_COPY: 0.0}
    timings = timing.interleave(calls, seconds, plan, device)
    copy_gbps = copied / timings[_LARGE_COPY].median() * 1e-9
    rates = Rates(gbps=2 * inputs.bytes / timings[_OWN_COPY].median() * 1e-9)

    rows = []
    for contestant in pool:
        row = _identity(case, inputs, contestant, device)
        entry = entries[contestant.name]
        if isinstance(entry, str):
            rows.append(row | {"status": entry})
            continue
        own = timings[contestant.name]
        row |= {"status": OK, **findings(entry, case, inputs)}
        gbps = (2 if contestant.yardstick else VALUES) * inputs.bytes / own.median() * 1e-9
        row |= {"gbps": gbps, "copy_gbps": copy_gbps, "of_copy": gbps / copy_gbps}
        if not contestant.yardstick:
            row |= roofline(Work(bytes=VALUES * inputs.bytes), rates, own.median())
        rows.append(row | {"base": base} | harness.figures(own, timings[base]))
    return rows


def own_copy(inputs: Inputs) -> timing.Call:
    """A copy of as many bytes as the weights have."""
    source = torch.zeros(inputs.bytes, dtype=torch.uint8, device=inputs.weights[0].device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def findings(entry: Entry, case: Case, inputs: Inputs) -> Row:
    """What a row says beside times. Bits count as given back if they are so too after all cycles that were timed.

    Raises:
        WrongResultError: ours changed bits.
    """
    if entry.contestant.yardstick:
        return dict.fromkeys(("value_error", "changed", "exact", "keeps_storage", "extra_bytes", "launches"))
    exact = not entry.changed and not cases.changed(inputs.weights, entry.problem.parameters)
    if entry.contestant.backend is not None and not exact:
        raise WrongResultError(f"{entry.contestant.name}, {case.name}: expected the same bits after the timed cycles")
    return {
        "value_error": entry.value_error,
        "changed": entry.changed,
        "exact": exact,
        "keeps_storage": entry.keeps_storage,
        "extra_bytes": entry.extra_bytes,
        "launches": entry.launches,
    }


def _identity(case: Case, inputs: Inputs, contestant: Contestant, device: str) -> Row:
    return {
        "operator": "perturbation",
        "case": case.name,
        "entries": inputs.entries,
        "tensors": len(inputs.weights),
        "weight_bytes": inputs.bytes,
        "dtype": case.dtype,
        "scope": case.scope,
        "adaptive": case.adaptive,
        "radius": case.radius,
        "device": device,
        "pass": CYCLE,
        "contestant": contestant.name,
        "yardstick": contestant.yardstick,
        "ours": contestant.backend is not None,
    }


def show(rows: list[Row]) -> None:
    """Prints the rows of a case."""
    first = rows[0]
    print(f"\n{first['case']}  {first['entries']} entries in {first['tensors']} tensors, {first['dtype']}  {CYCLE}")
    print(
        f"  {'':34}{'us':>11}{'GB/s':>8}{'of copy':>9}{'of roof':>9}{'x ours':>8}  {'(rounds)':16}"
        f"{'error':>8}{'bits':>7}{'place':>7}{'memory':>8}{'launches':>9}"
    )
    for row in rows:
        name = f"{row['contestant']:34}"
        if row["status"] != OK:
            print(f"  {name}{row['status']}")
            continue
        spread = f"({row['ratio_min']:.3g}..{row['ratio_max']:.3g})"
        roof = "" if row["yardstick"] else f"{row['roofline']:.2f}"
        line = f"{row['us']:11.1f}{row['gbps']:8.2f}{row['of_copy']:9.2f}{roof:>9}{row['ratio']:8.3g}  {spread:16}"
        if not row["yardstick"]:
            bits = f"{100 * row['changed']:.0f}% off" if row["changed"] else "same" if row["exact"] else "other"
            place = "same" if row["keeps_storage"] else "new"
            memory = f"{row['extra_bytes'] / row['weight_bytes']:.2f}x"
            line += f"{row['value_error']:8.0e}{bits:>7}{place:>7}{memory:>8}{row['launches'] or '':>9}"
        print(f"  {name}{line}", flush=True)

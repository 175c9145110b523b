"""Measures attention: gates every contestant on the float64 reference at the valid positions, then times.

A peer that raises, or whose result is wrong, is reported with the reason and not timed. Where ours is wrong the case is
not timed and the run fails. GFLOP/s count valid pairs alone, 4 D a pair forward and 10 D backward, beside those of a
matrix product, which takes its turns like a contestant. In the forward pass nothing needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast.bench import ceilings, counters, harness, timing
from mmer_fast.bench.attention import cases
from mmer_fast.bench.attention.cases import Case, Inputs
from mmer_fast.bench.attention.contestants import PLAIN, WEIGHT_GRADIENT, Attend, Contestant, base_of
from mmer_fast.bench.harness import FORWARD, FORWARD_BACKWARD, OK, NoBackendError, Row, WrongResultError
from mmer_fast.bench.roofline import Rates, Work, roofline

# Largest error at valid positions over the largest entry: of the output, and of each gradient. Half types round p (and
# some kernels ds) to their own precision.
TOLERANCES = {"fp32": (4e-6, 2e-5), "bf16": (1e-2, 3e-2)}
_COPY, _PRODUCT = "rate of a copy", "rate of a product, "  # take their turns too
_PATIENCE = 10.0  # seconds: a call that takes longer is not repeated for its warm time


@dataclass(frozen=True)
class Truth:
    """Output and gradients in float64, padded, 0 in the padding; by name: "o", "q", "k", "v" and with weights "m"."""

    by_name: dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """A contestant that takes part in a pass."""

    contestant: Contestant
    call: timing.Call
    seconds: float
    value_error: float
    gradient_error: float | None
    extra_bytes: int | None


def solve_reference(inputs: Inputs, weighted: bool) -> Truth:
    """Sample by sample: a float64 score matrix of a whole batch may not fit."""
    parts: dict[str, list[Tensor]] = {}
    for b in range(inputs.q.shape[0]):
        leaves = {n: getattr(inputs, n)[b : b + 1].double().requires_grad_() for n in ("q", "k", "v")}
        if weighted:
            leaves["m"] = inputs.key_weights[b : b + 1].double().requires_grad_()
        lengths = inputs.lengths[b : b + 1]
        out = mf.masked_attention(*leaves.values(), lengths=lengths, query_lengths=lengths, backend="reference")
        assert isinstance(out, Tensor)
        grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out[b : b + 1].double())
        for name, x in zip(("o", *leaves), (out.detach(), *grads), strict=True):
            parts.setdefault(name, []).append(x)
    return Truth({name: torch.cat(xs) for name, xs in parts.items()})


def make_call(contestant: Contestant, attend: Attend, inputs: Inputs, step: str) -> timing.Call:
    """A call that returns {"o": output}, and in `FORWARD_BACKWARD` the gradients too; in the contestant's layout."""
    place: Callable[[Tensor], Tensor] = inputs.pack if contestant.packed else torch.clone
    with_gradient = step == FORWARD_BACKWARD
    leaves = {name: place(getattr(inputs, name)) for name in ("q", "k", "v")}
    grad_out = place(inputs.grad_out)
    m = None if contestant.task == PLAIN else place(inputs.key_weights)
    if contestant.task == WEIGHT_GRADIENT and m is not None:
        leaves["m"] = m
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    if not with_gradient:
        return lambda: {"o": attend(q, k, v, m)}
    for leaf in leaves.values():
        leaf.requires_grad_()

    def forward_backward() -> dict[str, Tensor]:
        out = attend(q, k, v, m)
        grads = torch.autograd.grad(out, list(leaves.values()), grad_out)
        return {"o": out, **dict(zip(leaves, grads, strict=True))}

    return forward_backward


def errors(contestant: Contestant, result: dict[str, Tensor], truth: Truth, inputs: Inputs) -> dict[str, float]:
    """By name the largest error at valid positions over the largest entry; NaN counts as infinitely wrong."""
    found = {}
    for name, got in result.items():
        expected = truth.by_name[name]
        got = (inputs.unpack(got) if contestant.packed else got).detach().double()
        valid = inputs.valid if name == "m" else inputs.valid[:, None, :, None]
        off = (got - expected).masked_fill(~valid, 0.0).abs().max() / expected.abs().max()
        found[name] = float(off.nan_to_num(nan=torch.inf))
    return found


def enter(contestant: Contestant, case: Case, inputs: Inputs, truth: Truth, step: str) -> Entry | str:
    """Loads, warms up and checks a contestant; or says why it does not take part.

    Raises:
        WrongResultError: ours raised, or is wrong.
    """
    device = inputs.q.device.type
    if (reason := contestant.reason()) is not None:
        return reason
    if contestant.compiled and step == FORWARD:
        return "only forward + backward is measured"
    held = contestant.square * inputs.q.element_size() * case.batch * case.heads * case.length**2
    if held > harness.memory_limit(device):
        return f"its (L, S) matrices need about {held * 1e-9:.0f} GB"
    mine = contestant.backend is not None
    try:
        call = make_call(contestant, contestant.attend(inputs), inputs, step)
        result, seconds = timing.time_once(call, device)
        if seconds < _PATIENCE or contestant.compiled:
            result, seconds = timing.time_once(call, device)  # the first call imports, compiles and allocates
        extra_bytes = counters.extra_bytes(call, seconds, device)
    except Exception as error:
        if mine:
            raise WrongResultError(f"{contestant.name}, {case.name}: raised {harness.brief(error)}") from error
        return f"unsupported: {harness.brief(error)}"
    found = errors(contestant, result, truth, inputs)
    value = found.pop("o")
    gradient = max(found.values(), default=None)
    value_limit, gradient_limit = TOLERANCES[case.dtype]
    if value > value_limit or (gradient or 0.0) > gradient_limit:
        text = ", ".join(f"{name} {error:.2g}" for name, error in {"o": value, **found}.items())
        wanted = f"errors within {value_limit:g} (o) and {gradient_limit:g} (gradients) of the float64 reference"
        if mine:
            raise WrongResultError(f"{contestant.name}, {case.name}: expected {wanted}, got {text}; nothing is timed")
        return f"wrong: errors {text}"
    return Entry(contestant, call, seconds, value, gradient, extra_bytes)


def matrix_products(case: Case, device: str) -> dict[str, timing.Call]:
    """What `ceilings.quickest_product` chooses from: products in the dtype of the case, and in float32."""
    return ceilings.matrix_products((cases.DTYPES[case.dtype], torch.float32), device)


def measure(case: Case, contestants: list[Contestant], device: str, plan: timing.Plan) -> list[Row]:
    """The rows of a case: forward, then forward + backward.

    Raises:
        WrongResultError: a result of ours is wrong.
        NoBackendError: no backend of ours can run on this device.
    """
    inputs = cases.build(case, device)
    pool = [contestant for contestant in contestants if contestant.serves(case)]
    truths = {weighted: solve_reference(inputs, weighted) for weighted in {c.task != PLAIN for c in pool}}
    yardsticks = {f"{_PRODUCT}{dtype}": call for dtype, call in matrix_products(case, device).items()}
    yardsticks[_COPY] = inputs.q.clone
    rows = []
    for step in (FORWARD, FORWARD_BACKWARD):
        entries = {c.name: enter(c, case, inputs, truths[c.task != PLAIN], step) for c in pool}
        active = {name: entry for name, entry in entries.items() if isinstance(entry, Entry)}
        taking_part = [entry.contestant for entry in active.values()]
        if not any(contestant.backend for contestant in taking_part):
            states = mf.backends()["masked_attention"]
            raise NoBackendError(f"no backend of mmer_fast serves {device}: {states}. Build the package first.")
        calls = {name: entry.call for name, entry in active.items()} | yardsticks
        seconds = {name: entry.seconds for name, entry in active.items()} | dict.fromkeys(yardsticks, 0.0)
        timings = timing.interleave(calls, seconds, plan, device)
        products = {n.removeprefix(_PRODUCT): timings[n].median() for n in yardsticks if n.startswith(_PRODUCT)}
        top = ceilings.quickest_product(products, device)
        copied = 2 * inputs.q.numel() * inputs.q.element_size()
        top_rates = Rates(gbps=copied / timings[_COPY].median() * 1e-9, gflops=top["mm_gflops"])
        for contestant in pool:
            row = _identity(case, contestant, step, device)
            entry = entries[contestant.name]
            if isinstance(entry, str):
                rows.append(row | {"status": entry})
                continue
            base = base_of(contestant, taking_part)
            own = timings[contestant.name]
            row |= {"status": OK, "value_error": entry.value_error, "gradient_error": entry.gradient_error}
            row |= {"extra_bytes": entry.extra_bytes} | rates(inputs, step, own.median(), top)
            row |= roofline(work(inputs, step), top_rates, own.median())
            rows.append(row | {"base": base.name} | harness.figures(own, timings[base.name]))
    torch.compiler.reset()
    return rows


def rates(inputs: Inputs, step: str, seconds: float, top: Row) -> Row:
    """GFLOP/s of a call on valid pairs, and their share of the ceiling `top`."""
    gflops = work(inputs, step).flops / seconds * 1e-9
    return {"gflops": gflops, **top, "of_mm": gflops / top["mm_gflops"]}


def work(inputs: Inputs, step: str) -> Work:
    """What a call cannot do without (see `roofline`): valid pairs, and the vectors of valid tokens."""
    flops = (4 if step == FORWARD else 14) * inputs.pairs * inputs.q.shape[-1]
    vectors = int(inputs.lengths.sum()) * inputs.q.shape[1] * (4 if step == FORWARD else 12)
    return Work(bytes=vectors * inputs.q.shape[-1] * inputs.q.element_size(), flops=flops)


def _identity(case: Case, contestant: Contestant, step: str, device: str) -> Row:
    return {
        "operator": "attention",
        "case": case.name,
        "batch": case.batch,
        "heads": case.heads,
        "width": case.width,
        "length": case.length,
        "dtype": case.dtype,
        "padded": case.padded,
        "padding": case.padding,
        "device": device,
        "pass": step,
        "contestant": contestant.name,
        "task": contestant.task,
        "packed": contestant.packed,
        "ours": contestant.backend is not None,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows of a case."""
    for step in (FORWARD, FORWARD_BACKWARD):
        print(f"\n{rows[0]['case']}  {step}")
        titles = f"{'us':>10}{'GFLOP/s':>9}{'of mm':>7}{'of roof':>8}{'x ours':>8}  {'(rounds)':16}"
        print(f"  {'':34}{titles}error value / gradient")
        for row in (row for row in rows if row["pass"] == step):
            name = f"{row['contestant']:34}"
            if row["status"] != OK:
                print(f"  {name}{row['status']}")
                continue
            spread = f"({row['ratio_min']:.3g}..{row['ratio_max']:.3g})"
            wrong = " / ".join(f"{e:.0e}" for e in (row["value_error"], row["gradient_error"]) if e is not None)
            rates = f"{row['us']:10.1f}{row['gflops']:9.1f}{row['of_mm']:7.2f}{row['roofline']:8.2f}"
            print(f"  {name}{rates}{row['ratio']:8.3g}  {spread:16}{wrong}", flush=True)

"""Peak memory of attention, forward + backward with the gradient of the weights, each measurement in a new process.

The process runs ``python -m benchmarks.attention.memory CONTESTANT LENGTH`` and prints its figures: the most that it
ever held, Python and torch included, and how much of that came after the inputs were there. One sample of 8 heads of
width 64 in float32. The gradient that goes in is 0 but at some queries: the kernels do not know, and the float64
reference of those queries is one of everything, without an (L, S) matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmer_fast as mf
from benchmarks.process_memory import status_bytes
from mmer_fast.bench import ceilings, harness, timing
from mmer_fast.bench.attention import cases, peers
from mmer_fast.bench.attention.cases import Case, Inputs
from mmer_fast.bench.attention.contestants import Contestant
from mmer_fast.bench.attention.measure import make_call, matrix_products, rates
from mmer_fast.bench.harness import FORWARD_BACKWARD, OK, Row, WrongResultError

ROOT = Path(__file__).resolve().parents[2]
CONTESTANTS = ("mmer_fast cpu, weight gradient", "SDPA, mask gradient")
TOLERANCE = 2e-5
_SAMPLE = 32  # queries compared with the reference


@dataclass(frozen=True)
class MemoryCase:
    name: str
    length: int

    @property
    def shape(self) -> Case:
        return Case(self.name, 1, 8, 64, self.length, padding=0.0)


def build(case: MemoryCase) -> Inputs:
    """The inputs; dL/do is 0 but at `_SAMPLE` queries spread over the length, whose gradients a reference can give."""
    inputs = cases.build(case.shape, "cpu")
    others = torch.ones(case.length, dtype=torch.bool).index_fill_(0, _sampled(inputs), False)
    inputs.grad_out.masked_fill_(others[:, None], 0.0)
    return inputs


def _sampled(inputs: Inputs) -> Tensor:
    length = inputs.q.shape[2]
    return torch.linspace(0, length - 1, min(_SAMPLE, length)).long()


def check(inputs: Inputs, result: dict[str, Tensor]) -> float:
    """The largest error over the largest entry: o and dq at the sampled queries, and dk, dv and dm everywhere."""
    rows = _sampled(inputs)
    leaves = {"q": inputs.q[:, :, rows], "k": inputs.k, "v": inputs.v, "m": inputs.key_weights}
    wide = {name: x.double().requires_grad_() for name, x in leaves.items()}
    out = mf.masked_attention(*wide.values(), backend="reference")
    assert isinstance(out, Tensor)
    grads = torch.autograd.grad(out, list(wide.values()), inputs.grad_out[:, :, rows].double())
    got = result | {name: result[name][:, :, rows] for name in ("o", "q")}
    found = [
        (got[name].detach() - expected).abs().max() / expected.abs().max()
        for name, expected in (("o", out.detach()), *zip(wide, grads, strict=True))
    ]
    return float(torch.stack(found).nan_to_num(nan=torch.inf).max())


def in_this_process(contestant: Contestant, case: MemoryCase) -> Row:
    """The figures of one measurement: bytes, time of one call, error."""

    def call_of(length: int) -> tuple[Inputs, timing.Call]:
        inputs = build(MemoryCase(case.name, length))
        return inputs, make_call(contestant, contestant.attend(inputs), inputs, FORWARD_BACKWARD)

    call_of(min(64, case.length))[1]()  # what is imported and started once is no part of the call
    inputs, call = call_of(case.length)
    held = status_bytes("VmRSS")
    result, seconds = timing.time_once(call, "cpu")
    peak = status_bytes("VmHWM")
    products = matrix_products(case.shape, "cpu")
    seconds_by_dtype = {dtype: timing.cpu_turn(product, 0.1)[0] for dtype, product in products.items()}
    top = ceilings.quickest_product(seconds_by_dtype, "cpu")
    return {
        "peak_bytes": peak,
        "above_inputs_bytes": peak - held,
        "us": seconds * 1e6,
        **rates(inputs, FORWARD_BACKWARD, seconds, top),
        "error": check(inputs, result),
    }


def measure(case: MemoryCase, contestants: list[Contestant]) -> list[Row]:
    """The rows of a case, a process each.

    Raises:
        WrongResultError: ours failed, or is wrong.
    """
    return [_row(case, contestant) for contestant in contestants if contestant.name in CONTESTANTS]


def _row(case: MemoryCase, contestant: Contestant) -> Row:
    shape, mine = case.shape, contestant.backend is not None
    row: dict[str, Any] = {
        "operator": "attention",
        "case": case.name,
        "batch": shape.batch,
        "heads": shape.heads,
        "width": shape.width,
        "length": shape.length,
        "dtype": shape.dtype,
        "padded": shape.padded,
        "padding": shape.padding,
        "device": "cpu",
        "pass": FORWARD_BACKWARD,
        "contestant": contestant.name,
        "task": contestant.task,
        "packed": contestant.packed,
        "ours": mine,
    }
    held = 4.0 * contestant.square * shape.heads * shape.length**2
    if held > harness.memory_limit("cpu"):
        return row | {"status": f"its (L, S) matrices need about {held * 1e-9:.0f} GB"}
    command = [sys.executable, "-m", "benchmarks.attention.memory", contestant.name, str(case.length)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        if mine:
            raise WrongResultError(f"{contestant.name}, {case.name}: {reason}")
        return row | {"status": f"unsupported: {reason[:160]}"}
    figures = json.loads(child.stdout.splitlines()[-1])
    if figures["error"] > TOLERANCE:
        text = f"errors within {TOLERANCE:g}, got {figures['error']:.2g}"
        if mine:
            raise WrongResultError(f"{contestant.name}, {case.name}: expected {text}")
        return row | {"status": f"wrong: expected {text}"}
    return row | {"status": OK} | figures


def show(rows: list[Row]) -> None:
    """Prints the rows of a case."""
    print(f"\n{rows[0]['case']}  peak memory, MiB")
    print(f"  {'':34}{'in all':>10}{'above inputs':>14}{'ms':>10}")
    for row in rows:
        if row["status"] != OK:
            print(f"  {row['contestant']:34}{row['status']}")
            continue
        peak, above = (row[key] / 2**20 for key in ("peak_bytes", "above_inputs_bytes"))
        print(f"  {row['contestant']:34}{peak:10.0f}{above:14.0f}{row['us'] * 1e-3:10.0f}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention.memory", description=__doc__)
    parser.add_argument("contestant", choices=[contestant.name for contestant in peers.select("cpu")])
    parser.add_argument("length", type=int)
    options = parser.parse_args(arguments)
    if (threads := os.environ.get("OMP_NUM_THREADS")) is not None:
        torch.set_num_threads(int(threads))
    contestant = next(c for c in peers.select("cpu") if c.name == options.contestant)
    print(json.dumps(in_this_process(contestant, MemoryCase(f"memory-L{options.length}", options.length))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

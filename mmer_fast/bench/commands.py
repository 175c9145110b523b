"""The command of `mmer-fast` that measures an operator on shapes of your own: bench."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmer_fast.bench import ceilings, results, timing
from mmer_fast.bench.shapes import OPERATORS, Operator, ShapeError, read_case
from mmer_fast.training.commands import app
from mmer_fast.training.options import DeviceOption, choose_device

OperatorName = Enum("OperatorName", {name: name for name in OPERATORS}, type=str)  # type: ignore[misc]


class PlanName(str, Enum):
    """Of `timing.PLANS`."""

    quick = "quick"
    standard = "standard"
    full = "full"


@app.command()
def bench(
    op: Annotated[OperatorName, typer.Option(help="The operator.")],
    case: Annotated[
        list[str],
        typer.Option(metavar="SIZES", help="; ".join(f"{name}: {op.usage}" for name, op in OPERATORS.items())),
    ],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or for the perturbation also float16.")] = "float32",
    contestants: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Only peers whose name contains this; repeatable.")
    ] = None,
    device: DeviceOption = "auto",
    plan: Annotated[PlanName, typer.Option(help="How long to measure.")] = PlanName.standard,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch. Default: torch's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="A directory for a JSON file of the rows.")] = None,
) -> None:
    """Time an operator on your own shapes beside its peers, once its results agree with the float64 reference."""
    operator = OPERATORS[op.value]
    cases = [read_case(operator, text, dtype) for text in case]
    chosen_device = choose_device(device)
    try:
        chosen = operator.select(chosen_device.type, contestants)
    except ValueError as error:
        raise ShapeError(f"--contestants: {error}") from None
    if chosen_device.type == "cuda":
        torch.cuda.set_device(chosen_device)
    if threads is not None:
        torch.set_num_threads(threads)
    result = measure(operator, cases, chosen, chosen_device.type, plan.value)
    if out is not None:
        path = results.new_file(out, result)
        results.write(result, path)
        typer.echo(f"\nwritten to {path}")


def measure(
    operator: Operator, cases: Sequence[Any], contestants: Sequence[Any], device: str, plan: str
) -> results.Result:
    """Measures and prints the cases, beside the ceilings of the machine."""
    result = results.header(device, plan, operator.packages)
    typer.echo(f"{ceilings.in_words(result['ceilings'])}; {torch.get_num_threads()} CPU threads")
    for case in cases:
        rows = operator.measure(case, contestants, device, timing.PLANS[plan][device])
        operator.show(rows)
        result["rows"] += rows
    return result

"""Measures the operators: ``python -m benchmarks.run --device cpu|cuda [--operator NAME ...] [--plan PLAN]``.

Writes one JSON file a run: rows with the machine, its ceilings, the versions and the commit. Prints at the end which
promises of `benchmarks.bars` hold; that is for the reader, and only a wrong result of ours makes the run fail.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks import bars
from benchmarks.attention.benchmark import OPERATOR as ATTENTION
from benchmarks.interface import Operator
from benchmarks.perturbation.benchmark import OPERATOR as PERTURBATION
from benchmarks.scaling.benchmark import OPERATOR as SCALING
from benchmarks.soft_topk.benchmark import OPERATOR as SOFT_TOPK
from benchmarks.training_step.benchmark import OPERATOR as TRAINING_STEP
from mmer_fast.bench import ceilings, results, timing
from mmer_fast.bench.harness import WrongResultError

OPERATORS: tuple[Operator, ...] = (SOFT_TOPK, ATTENTION, PERTURBATION, TRAINING_STEP, SCALING)


def choose(
    operators: list[Operator], device: str, cases: list[str] | None, parts: list[str] | None
) -> list[tuple[Operator, list[str], list[str] | None]]:
    """For each operator that takes part its cases, and the parts of contestants' names that fit it.

    Raises:
        ValueError: a pattern of cases, or a part of a contestant's name, that fits none of the operators.
    """
    known = [name for operator in operators for name in operator.cases(device)]
    if unknown := [pattern for pattern in cases or () if not fnmatch.filter(known, pattern)]:
        raise ValueError(f"cases must be among {', '.join(known)} on {device}, got {', '.join(unknown)}")
    names = [name for operator in operators for name in operator.contestants(device)]
    for part in parts or ():
        if not any(part in name for name in names):
            raise ValueError(f"contestants must be among {', '.join(names)}, got {part!r}")
    chosen: list[tuple[Operator, list[str], list[str] | None]] = []
    for operator in operators:
        own_cases = [n for n in operator.cases(device) if not cases or any(fnmatch.fnmatchcase(n, c) for c in cases)]
        own_parts = [p for p in parts or () if any(p in name for name in operator.contestants(device))]
        if own_cases and (own_parts or not parts):
            chosen.append((operator, own_cases, own_parts or None))
    return chosen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    names = [operator.name for operator in OPERATORS]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--operator", nargs="+", choices=(*names, "all"), default=["all"])
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", help="only these, patterns too (what fits none lists them)"
    )
    parser.add_argument("--contestants", nargs="+", metavar="TEXT", help="only those whose name contains TEXT")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default 2)")
    parser.add_argument(
        "--plan", choices=tuple(timing.PLANS), default="standard", help="how long to measure; full: many more rounds"
    )
    parser.add_argument("--quick", action="store_true", help="--plan quick: for a look, never for a report")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="S",
        help="starts no further case after S seconds, shared evenly by the operators: what one leaves goes to the next",
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    operators = [operator for operator in OPERATORS if {operator.name, "all"} & set(options.operator)]
    try:
        options.chosen = choose(operators, options.device, options.cases, options.contestants)
    except ValueError as error:
        parser.error(str(error))
    return options


def _share(now: float, end: float, operators: int) -> float:
    """When the next of `operators` must give way: after its part of the time that is left."""
    return now + (end - now) / operators


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    end = None if options.time_limit is None else time.monotonic() + options.time_limit
    torch.set_num_threads(options.threads)
    name_of_plan = "quick" if options.quick else options.plan
    plan = timing.PLANS[name_of_plan][options.device]
    packages = sorted({package for operator in OPERATORS for package in operator.packages})
    result = results.header(options.device, name_of_plan, packages)
    print(f"{ceilings.in_words(result['ceilings'])}; {options.threads} CPU threads")
    path = results.new_file(options.out, result)
    failures = 0
    for place, (operator, names, parts) in enumerate(options.chosen):
        stop = None if end is None else _share(time.monotonic(), end, len(options.chosen) - place)
        for name in names:
            if stop is not None and time.monotonic() > stop:
                print(f"{operator.name} {name}: left out, beyond its share of the limit of {options.time_limit:g} s")
                continue
            try:
                rows = operator.measure(name, parts, options.device, plan)
            except WrongResultError as error:
                if error.__cause__ is not None:
                    traceback.print_exception(error.__cause__)
                print(f"error: {error}", file=sys.stderr)
                failures += 1
                continue
            operator.show(rows)
            result["rows"] += rows
            results.write(result, path)  # after each case: a run that is cut short is kept
    if result["rows"]:
        promises = [bar for operator, _, _ in options.chosen for bar in operator.bars[options.device]]
        verdicts = bars.check(result, bars.of_cases(promises, result))
        print(*(f"\n{line}" for _, line in verdicts), sep="")
        print(f"\nwritten: {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of a training step: the most that it holds at once beyond the model and the batch.

On a CPU each measurement is a process of its own, ``python -m benchmarks.training_step.memory CASE CONTESTANT``: what
another contestant freed and the allocator kept is no part of it. Gradients and the state of AdamW count: they come with
the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.case_table import TRAINING_STEP, find
from benchmarks.process_memory import status_bytes
from benchmarks.training_step import cases
from benchmarks.training_step.cases import Case, Inputs
from benchmarks.training_step.contestants import CONTESTANTS, Contestant
from mmer_fast.bench.harness import WrongResultError

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2  # gradients and AdamW's state come with the first
_SMALL = {"dim": 16, "ffn_dim": 16, "heads": 2}


def peak_bytes(case: Case, contestant: Contestant, inputs: Inputs) -> int:
    """Bytes of a step of `contestant` on `case`; on CUDA those of torch's allocator.

    Raises:
        WrongResultError: the process failed.
    """
    if inputs.batch.labels.is_cuda:
        return _allocated(contestant, inputs)
    command = [sys.executable, "-m", "benchmarks.training_step.memory", case.name, contestant.name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise WrongResultError(f"peak memory of {contestant.name}, {case.name}: {reason}")
    return int(json.loads(child.stdout.splitlines()[-1]))


def _allocated(contestant: Contestant, inputs: Inputs) -> int:
    inputs.model.zero_grad()
    before = torch.cuda.memory_allocated()
    call = contestant.prepare(inputs)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        call()
    return torch.cuda.max_memory_allocated() - before


def in_this_process(case: Case, contestant: Contestant) -> int:
    """Bytes that `STEPS` steps add to what the process holds when model and batch are there."""
    small = replace(case, samples=2, sizes=(*case.sizes, *_SMALL.items()))
    contestant.prepare(cases.build(small, "cpu"))()  # what is imported and started once is no part of the step
    call = contestant.prepare(cases.build(case, "cpu"))
    held = status_bytes("VmRSS")
    for _ in range(STEPS):
        call()
    return status_bytes("VmHWM") - held


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step.memory", description=__doc__)
    parser.add_argument("case", choices=[case.name for case in TRAINING_STEP["cpu"]])
    parser.add_argument("contestant", choices=[contestant.name for contestant in CONTESTANTS])
    options = parser.parse_args(arguments)
    if (threads := os.environ.get("OMP_NUM_THREADS")) is not None:
        torch.set_num_threads(int(threads))
    (contestant,) = (c for c in CONTESTANTS if c.name == options.contestant)
    print(json.dumps(in_this_process(find(TRAINING_STEP["cpu"], options.case), contestant)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

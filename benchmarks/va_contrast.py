"""UniVA's contrastive loss beside its naive forms, forward + backward: ``python -m benchmarks.va_contrast``.

    blocks             `mmer_fast.systems.univa.va_contrastive_loss`
    all pairs          the matrices (B, B) of scores and of VA distances, as in the published code, by autograd
    all products       the products (B, B, D) of all pairs and their VA differences (B, B, 2), then the same

Each form on each size is a process of its own: its peak is what it adds to what the process holds with torch and the
inputs. Its gradient is compared with that of "all pairs" in float64. This is a script and not one more `Operator` of
`benchmarks.run`: it is about one loss of a sister system, has no compiled kernel, and promises memory more than time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.bench import machine
from mmer_fast.systems.univa import va_contrastive_loss

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE, DISTANCE = 0.4, 0.1
TOLERANCE = 1e-4  # of the gradient, relative to its norm
MOST_BYTES = 6e9  # what a form may keep for its backward pass

Loss = Callable[[Tensor, Tensor], Tensor]


def blocks(features_bd: Tensor, va_b2: Tensor) -> Tensor:
    return va_contrastive_loss(features_bd, va_b2, temperature=TEMPERATURE, distance=DISTANCE)


def all_pairs(features_bd: Tensor, va_b2: Tensor) -> Tensor:
    h_bd = F.normalize(features_bd, dim=1)
    return _loss(h_bd @ h_bd.T, torch.cdist(va_b2, va_b2, compute_mode="donot_use_mm_for_euclid_dist"))


def all_products(features_bd: Tensor, va_b2: Tensor) -> Tensor:
    h_bd = F.normalize(features_bd, dim=1)
    cosines_bb = (h_bd[:, None] * h_bd[None]).sum(dim=2)
    return _loss(cosines_bb, (va_b2[:, None] - va_b2[None]).square().sum(dim=2).sqrt())


def _loss(cosines_bb: Tensor, distances_bb: Tensor) -> Tensor:
    own_bb = torch.eye(len(cosines_bb), dtype=torch.bool, device=cosines_bb.device)
    scores_bb = (cosines_bb / TEMPERATURE).masked_fill(own_bb, -torch.inf)
    positive_bb = (distances_bb < DISTANCE) & ~own_bb
    log_shares_bb = scores_bb.log_softmax(dim=1).masked_fill(~positive_bb, 0.0)
    return -(log_shares_bb.sum(dim=1) / positive_bb.sum(dim=1).clamp(min=1)).sum()


FORMS: dict[str, Loss] = {"blocks": blocks, "all pairs": all_pairs, "all products": all_products}


def kept_bytes(form: str, samples: int, width: int) -> float:
    """About what autograd keeps in float32: a few matrices of pairs, and the products of all pairs."""
    pairs = 4.0 * samples**2
    return {"blocks": 0.0, "all pairs": 4 * pairs, "all products": (3 * width + 8) * pairs}[form]


def inputs(samples: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Features (B, D) with a gradient, and VA scores (B, 2) around six emotions, about a sixth positives."""
    generator = torch.Generator().manual_seed(0)
    features_bd = torch.randn(samples, width, generator=generator)
    centres_62 = torch.rand(6, 2, generator=generator)
    va_b2 = centres_62[torch.randint(6, (samples,), generator=generator)]
    va_b2 = va_b2 + 0.03 * torch.randn(samples, 2, generator=generator)
    return features_bd.to(device).requires_grad_(), va_b2.to(device)


def measure(form: str, samples: int, width: int, device: str, rounds: int) -> dict[str, Any]:
    """Time and peak memory of one form in this process, and how far its gradient is off."""

    def run(features_bd: Tensor, va_b2: Tensor, loss: Loss) -> Tensor:
        (gradient_bd,) = torch.autograd.grad(loss(features_bd, va_b2), features_bd)
        return gradient_bd

    run(*inputs(32, width, device), FORMS[form])  # what is imported and started once is no part of it
    features_bd, va_b2 = inputs(samples, width, device)
    gradient_bd, peak = _with_peak(lambda: run(features_bd, va_b2, FORMS[form]), device)
    seconds = [_timed(lambda: run(features_bd, va_b2, FORMS[form]), device) for _ in range(rounds)]
    truth_bd = run(features_bd.detach().double().requires_grad_(), va_b2.double(), all_pairs)
    error = float((gradient_bd.double() - truth_bd).norm() / truth_bd.norm())
    return {"seconds": statistics.median(seconds), "peak_bytes": peak, "gradient_error": error}


def _with_peak(call: Callable[[], Tensor], device: str) -> tuple[Tensor, int]:
    """The result of the first large call of a process, and the most bytes that it held at once: by the kernel's account
    (Linux), or by that of torch's allocator on CUDA.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        return call(), torch.cuda.max_memory_allocated() - held
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    result = call()
    return result, max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held, 0)


def _timed(call: Callable[[], Tensor], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def provenance(device: str, threads: int) -> dict[str, Any]:
    """Where and with what these figures were taken."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        **machine.provenance(),
        "machine": {"cpu": machine.cpu_model(), "cpu_generation": machine.cpu_generation(), "gpu": gpu},
        "threads": threads,
    }


def in_a_process(form: str, samples: int, width: int, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a new process.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks.va_contrast", "--device", options.device, "--form", form]
    command += ["--threads", str(options.threads), "--rounds", str(options.rounds), "--width", str(width)]
    child = subprocess.run([*command, "--samples", str(samples)], cwd=ROOT, capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(f"{form}, {samples}: {child.stderr.strip() or f'exit status {child.returncode}'}")
    row: dict[str, Any] = json.loads(child.stdout)
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.va_contrast", description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[1024, 4096], help="B")
    parser.add_argument("--width", type=int, default=128, help="D")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls; the median counts")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures, with machine, versions and commit")
    parser.add_argument("--form", choices=FORMS, help="measure this one in this process, and print JSON")
    options = parser.parse_args(arguments)
    if options.form is not None:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.form, options.samples[0], options.width, options.device, options.rounds)))
        return 0
    wrong = 0
    rows: list[dict[str, Any]] = []
    for samples in options.samples:
        print(f"B = {samples}, D = {options.width}, {options.device}, forward + backward")
        for form in FORMS:
            kept = kept_bytes(form, samples, options.width)
            if kept > MOST_BYTES:
                print(f"  {form:14} not run: its backward pass needs about {kept * 1e-9:.0f} GB")
                continue
            row = in_a_process(form, samples, options.width, options)
            rows.append({"form": form, "samples": samples, "width": options.width, **row})
            off = row["gradient_error"]
            wrong += not off <= TOLERANCE
            figures = f"{row['seconds'] * 1e3:9.1f} ms{row['peak_bytes'] / 2**20:9.0f} MiB"
            print(f"  {form:14}{figures}   error {off:.0e}{'' if off <= TOLERANCE else '  WRONG'}", flush=True)
    if options.out is not None and not wrong:
        options.out.write_text(
            json.dumps({**provenance(options.device, options.threads), "rows": rows}, indent=1) + "\n"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

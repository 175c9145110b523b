"""Checks that run in N gloo processes at once: one start of the processes for many checks, a verdict on each."""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COLLECTIVE = 60  # seconds after which a collective that a rank does not join is an error
LIMIT = 300  # seconds after which a process that still runs prints where it stands, and exits
# Imported once, by the server that the processes are forks of.
IMPORTS = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint", "mmer_fast"]

Verdict = Callable[[int, str], str]


def verdicts(request: pytest.FixtureRequest, folders: pytest.TempPathFactory, imports: Sequence[str] = ()) -> Verdict:
    """What went wrong in a check, for a test parametrized by `world` and `check`, a "name:function" of checks_name.py.

    The first question for a number of processes runs all checks of the file that were selected.

    Args:
        imports: modules that the processes need beside `IMPORTS`.
    """
    items = [item for item in request.session.items if item.path == Path(request.path) and hasattr(item, "callspec")]
    chosen = [item.callspec.params for item in items if "check" in item.callspec.params]
    found: dict[int, dict[str, str]] = {}

    def of(world: int, check: str) -> str:
        if world not in found:
            checks = [params["check"] for params in chosen if params["world"] == world]
            found[world] = run(
                [f"checks_{check}" for check in checks], world, folders.mktemp(f"{world}_processes"), imports
            )
        return found[world][f"checks_{check}"]

    return of


def run(checks: list[str], world: int, folder: Path, imports: Sequence[str] = ()) -> dict[str, str]:
    """Calls `checks`, each a "module:function", with (rank, world) in `world` processes.

    The ranks meet after each check. When one fails, those after it are left out: collectives may be out of step.

    Returns:
        For each check what went wrong, on which ranks; "" where nothing did.
    """
    multiprocessing.set_forkserver_preload([*IMPORTS, *imports])
    context = mp.start_processes(
        _rank, (world, checks, str(folder)), nprocs=world, join=False, start_method="forkserver"
    )
    end = ""
    deadline = time.monotonic() + LIMIT + COLLECTIVE
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                end = "the processes were killed"
                break
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        end = str(error)
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    verdicts = [_read(folder / f"{rank}.json") for rank in range(world)]
    return {check: _summary(check, verdicts, end) for check in checks}


def _summary(check: str, verdicts: list[dict[str, str]], end: str) -> str:
    failed = [f"rank {rank}: {verdict[check]}" for rank, verdict in enumerate(verdicts) if verdict.get(check)]
    missing = [rank for rank, verdict in enumerate(verdicts) if check not in verdict]
    if missing and not failed:
        return f"not finished on ranks {missing}, or left out because one before it failed. {end}"
    return "\n".join(failed)


def _read(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.exists() else {}


def _rank(rank: int, world: int, checks: list[str], folder: str) -> None:
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "precision='bfloat16' is some ten times slower")  # on CPUs without AVX-512
    store = dist.FileStore(f"{folder}/store", world)
    store.set_timeout(timedelta(seconds=2 * COLLECTIVE))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=COLLECTIVE))
    verdict: dict[str, str] = {}
    for check in checks:
        module, function = check.split(":")
        try:
            getattr(importlib.import_module(module), function)(rank, world)
            verdict[check] = ""
        except BaseException:
            verdict[check] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(verdict))
        store.set(f"verdict/{check}/{rank}", verdict[check] or "passed")
        if any(store.get(f"verdict/{check}/{other}") != b"passed" for other in range(world)):
            break
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()

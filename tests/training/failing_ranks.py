"""`mmer-fast train` in processes as torchrun starts them, but nobody ends those that are left when one fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import process_group
import torch
import torch.distributed as dist

SECONDS = 60
PATIENCE = 6  # seconds of `--timeout` where a rank hangs
IMPORTS = ["mmer_fast.training.commands", "mmer_fast.report", "matplotlib.pyplot"]


def fail(step: int) -> None:
    if step == 3:
        raise ValueError("a test wants it")


def fill(step: int) -> None:
    if step == 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fill_in_validation(step: int) -> None:
    from mmer_fast.training import trainer

    trainer.evaluate = lambda *_, **__: fill(3)  # type: ignore[assignment]


def hang(step: int) -> None:
    if step == 3:
        time.sleep(2 * PATIENCE)


def write_slowly(step: int) -> None:
    """The report takes longer than the others have patience."""
    from mmer_fast.report import document

    analyse = document.analyse
    if step == 0:
        document.analyse = lambda *given, **options: time.sleep(2 * PATIENCE) or analyse(*given, **options)


def fail_to_write(step: int) -> None:
    from mmer_fast.report import document

    document.analyse = lambda *_, **__: fail(3)  # type: ignore[assignment, return-value]


def die(step: int) -> None:
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def warn(step: int) -> None:
    if step == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def go_on(step: int) -> None:
    """Nothing fails."""


def train(arguments: list[str], faults: list[Callable[[int], None]], folder: Path) -> tuple[list[int], list[str]]:
    """Exit codes and what each process wrote on standard error.

    Args:
        faults: for each rank what to call before each step.
    """
    multiprocessing.set_forkserver_preload([*process_group.IMPORTS, *IMPORTS])
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # kept here as torchrun keeps it
    files = [folder / f"stderr{rank}" for rank in range(len(faults))]
    processes = [
        context.Process(target=_rank, args=(rank, len(faults), store.port, arguments, fault, files[rank]))
        for rank, fault in enumerate(faults)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not late, f"ranks {late} did not end"
    return [int(process.exitcode or 0) for process in processes], [path.read_text() for path in files]


def _rank(rank: int, size: int, port: int, arguments: list[str], fault: Callable[[int], None], stderr: Path) -> None:
    from mmer_fast.cli import main
    from mmer_fast.training.trainer import Trainer

    with open(stderr, "wb") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})
    optimize = Trainer._optimize

    def failing(self: Any, *positional: Any) -> Any:
        fault(positional[2])
        return optimize(self, *positional)

    Trainer._optimize = failing  # type: ignore[method-assign]
    main(arguments)

"""Operators called from many Python threads at once, and split over several threads of torch, give the serial bits."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import public_calls
import pytest
import torch
from public_calls import CALLS, same_bits

import mmer_fast as mf
from mmer_fast import ops

THREADS = 8
SIZE = 48
LARGE = 256  # so that torch's threads share the work


@pytest.fixture
def threads_of_torch() -> Iterator[Callable[[int], None]]:
    """Sets how many threads an operator is split over, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_every_public_operator_is_among_the_calls() -> None:
    source = inspect.getsource(public_calls)
    functions = {name for name in mf.__all__ if inspect.isfunction(getattr(mf, name))}
    settings = {"backends", "checked", "use_backend"}
    calls = {f"mf.{name}(" for name in functions - settings} | {f"ops.{name}(" for name in ops.__all__}
    missing = {call for call in calls if call not in source}
    assert not missing


def together(work: Callable[[int], None]) -> None:
    """`work` of 0 to THREADS - 1, each in a thread, all let off at once; what one of them raises is raised here."""
    barrier, errors = threading.Barrier(THREADS), []

    def run(number: int) -> None:
        barrier.wait(60)
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("split", [1, 2])
def test_calls_from_many_threads(split: int, threads_of_torch: Callable[[int], None]) -> None:
    """Each thread makes all calls, beginning with another one, so that everything runs beside everything."""
    threads_of_torch(split)
    expected = {name: call(SIZE) for name, call in CALLS.items()}
    names, different = list(CALLS), []

    def work(number: int) -> None:
        for _ in range(3):
            for name in names[number:] + names[:number]:
                if not same_bits(CALLS[name](SIZE), expected[name]):
                    different.append(name)

    together(work)
    assert not different


def test_one_layer_shared_by_many_threads() -> None:
    """Threads that read the same weights, as a server's do."""
    layer = mf.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(3, 20, 16)
    results = [torch.empty(0)] * THREADS
    with torch.no_grad():
        expected = layer(x, x, x)[0]

    def work(number: int) -> None:
        with torch.no_grad():
            results[number] = layer(x, x, x)[0]

    together(work)
    assert all(torch.equal(result, expected) for result in results)


# Its linear layer is torch's, whose products come out otherwise from three threads on.
OF_TORCH = {"self_attention"}


@pytest.mark.parametrize("name", sorted(CALLS.keys() - OF_TORCH))
def test_any_number_of_threads_gives_the_same_bits(name: str, threads_of_torch: Callable[[int], None]) -> None:
    threads_of_torch(1)
    expected = CALLS[name](LARGE)
    for split in (2, 3):
        threads_of_torch(split)
        assert same_bits(CALLS[name](LARGE), expected), f"{split} threads"


FIRST_CALLS = """
import sys
sys.path.insert(0, sys.argv[1])
from public_calls import CALLS, same_bits
from test_threads import THREADS, together
results = {name: [None] * THREADS for name in CALLS}
def work(number):
    for name in CALLS:
        results[name][number] = CALLS[name](9)
together(work)
assert all(same_bits(one, CALLS[name](9)) for name in CALLS for one in results[name])
"""


def test_first_calls_of_a_process_from_many_threads() -> None:
    """What is set up on first use (instruction set, lazy imports) may be set up by several threads at once."""
    script = [sys.executable, "-c", FIRST_CALLS, str(Path(__file__).parent)]
    run = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr

"""The CUDA soft top-k kernels without a GPU: their sources run on the host, thread by thread (cuda_emulation).

The cases and what is checked are those of the CPU kernels (cpu_kernel_cases, run_cpu_kernels): weights and gradients
beside the float64 oracle, unwritten entries, a row by itself and among others bit for bit. Every array ends at a page
without access, shared memory is NaN at first, and each kernel runs twice with its warps in another order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cpu_kernel_cases import SIZES, Case, Inputs, cases
from cuda_emulation import launch
from cuda_emulation.soft_topk_launch import Machine
from guarded_memory import GuardPages
from numpy_oracle import DTYPES, forward, widen
from run_cpu_kernels import Run

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)

pytestmark = pytest.mark.skipif(launch.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Path:
    return launch.build(pytestconfig.cache.mkdir("cuda_emulation"), "soft_topk")


def problems(machine: Machine, case: Case) -> list[str]:
    return [f"{case}: {problem}" for problem in Run(machine, Inputs(case), GuardPages()).problems()]


@pytest.mark.parametrize("n", [*SIZES, 128, 512, 513, 1024, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_length(library: Path, dtype: str, n: int) -> None:
    """Rows of a group of lanes, of a warp, of a block with all entries in shared memory."""
    machine = Machine(library)
    assert not [problem for case in cases([dtype], [n]) for problem in problems(machine, case)]


@pytest.mark.parametrize(("rows", "n"), [(4101, 7), (1025, 130)])
def test_blocks_of_several_warps(library: Path, rows: int, n: int) -> None:
    """As many rows as make them, the last block not full; a row has the bits that it has by itself."""
    rng, pages, machine = np.random.default_rng(0), GuardPages(), Machine(library)
    scores, k = pages((rows, n), F32), pages((rows,), F64)
    scores[...], k[...] = rng.standard_normal((rows, n)), rng.uniform(1, n - 1, rows)
    results = [pages(shape, dtype) for shape, dtype in (((rows, n), F32), ((rows, 1), F64), ((rows, 2), F64))]
    options = {"k": k, "sinkhorn_iterations": 0, "dtype": "float32", "largest": True, "tau": 0.05}
    options |= {"lengths": None, "mask": None}
    machine.soft_topk_forward(scores, *results, begin=0, end=rows, **options)
    assert np.abs(results[0].sum(-1, dtype=F64) - k).max() < 1e-5 * n
    for row in (*range(0, rows, 100), rows - 1):
        expected = forward(scores[row].astype(F64), k[row], 0.05)
        np.testing.assert_allclose(results[0][row], expected, rtol=0, atol=1e-6)
    alone = [np.zeros_like(array) for array in results]
    machine.soft_topk_forward(scores, *alone, begin=rows - 1, end=rows, **options)
    assert all(one[-1].tobytes() == array[-1].tobytes() for one, array in zip(alone, results, strict=True))


LONG = (
    {},
    {"scores": "outlier", "tau": 5e-5, "padding": "lengths", "k": "rows"},
    {"padding": "mask", "strided": True, "k": "rows"},
    {"k": "near", "scores": "tied"},
    {"scores": "nan"},
    {"tau": 0.5, "sinkhorn": 3, "largest": False},
)


@pytest.mark.parametrize("variant", LONG, ids=str)
@pytest.mark.parametrize(("n", "ranks"), [(30000, 1), (16384, 2), (20001, 2), (33000, 4), (70001, 8), (131072, 16)])
def test_a_cluster_shares_a_row(library: Path, n: int, ranks: int, variant: dict) -> None:
    """With one block, what shared memory has no room for is read again in every sweep."""
    machine = Machine(library, ranks)
    assert not problems(machine, Case("float32", n, **variant))
    assert machine.ranks == ranks


@pytest.mark.parametrize("variant", LONG, ids=str)
@pytest.mark.parametrize(("n", "ranks"), [(12000, 1), (40001, 4)])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_cluster_shares_a_row_of_another_dtype(library: Path, dtype: str, n: int, ranks: int, variant: dict) -> None:
    machine = Machine(library, ranks)
    assert not problems(machine, Case(dtype, n, **variant))
    assert machine.ranks == ranks


@pytest.mark.parametrize(("dtype", "n"), [("float32", 1), ("float32", 7), ("bfloat16", 200), ("float32", 1134)])
def test_thresholds_beyond_all_floats(library: Path, dtype: str, n: int) -> None:
    run = Run(Machine(library), Inputs(Case(dtype, n, tau=1.5e38)), GuardPages())
    run.k = 6e-202
    weights, threshold, certificate = run.forward()
    assert not widen(weights, dtype).any()
    assert (threshold > 1e38).all()
    assert (np.abs(certificate[:, 0]) < 1e-200).all()
    gradients = run.backward(threshold)
    assert all(np.isfinite(widen(x, dtype) if x is gradients[0] else x).all() for x in gradients)


def test_a_device_without_room_for_large_clusters(library: Path) -> None:
    machine = Machine(library, 16, resident_cluster=2)
    assert not problems(machine, Case("float32", 70001))
    assert machine.ranks == 2


def test_an_access_beyond_an_array_is_found(library: Path) -> None:
    """The guard pages work: weights of fewer entries than there are scores end the launch."""
    run, pages = Run(Machine(library), Inputs(Case("float32", 1134)), GuardPages()), GuardPages()
    results = [pages(shape, dtype) for shape, dtype in (((3, 1000), F32), ((3, 1), F64), ((3, 2), F64))]
    with pytest.raises(AssertionError, match="error 719"):
        run.module.soft_topk_forward(run.scores, *results, k=1.0, sinkhorn_iterations=0, begin=0, end=3, **run.options)

"""Every row is solved within a fixed number of sweeps, whatever its scores, k and epsilon (the certificate says so)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import soft_topk_oracle as oracle
import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast import _extension

MOST_SWEEPS = {"cpu": 10, "cuda": 11, "triton": 11}  # 11: selection in float64 sweeps once more
EPSILONS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)


def _with_outlier(value: float) -> Callable[[Tensor], Tensor]:
    def make(x: Tensor) -> Tensor:
        x[0] = value
        return x

    return make


# From n standard normal numbers to the scores of a row.
FAMILIES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "uniform": lambda x: torch.special.ndtr(x),
    "sigmoid": lambda x: torch.sigmoid(3 * x),
    "constant": torch.zeros_like,
    "two values": lambda x: (x > 0.3).to(x.dtype),
    "tied": lambda x: (2 * x).round() / 2,
    "clustered": lambda x: x.round() + 1e-3 * x,
    "bimodal": lambda x: x + 5 * x.sign(),
    "exponential": lambda x: -torch.special.log_ndtr(x),
    "heavy tails": lambda x: x**3 * x.abs().exp(),
    "evenly spaced": lambda x: torch.linspace(0, 1, len(x), dtype=x.dtype),
    "one high outlier": _with_outlier(1e4),
    "one low outlier": _with_outlier(-1e4),
}


def _choices_of_k(n: int) -> list[float]:
    """Shares of n as floating point gives them, integers, and numbers a hair from an integer."""
    shares = [share * n for share in (0.001, 0.07, 0.4, 0.5, 0.95)]
    counts = sorted({1, round(0.4 * n), n - 1})
    off = [1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 0.3]
    near = [count + sign * distance for count in counts for distance in off for sign in (1, -1)]
    near += [math.nextafter(count, side) for count in counts for side in (0, n)]
    return [k for k in (*shares, *map(float, counts), *near) if 0 < k < n]


def _assert_solved(scores: Tensor, k: Tensor, epsilon: Tensor, names: list[str], backend: str) -> None:
    n = scores.shape[-1]
    weights, info = mf.soft_topk(scores, k, epsilon=epsilon, return_info=True, backend=backend)
    error = (weights.double().sum(-1) - k).abs()
    wrong = (error > 1e-5 * n) | (info.residual.abs() > 1e-5 * n) | (info.sweeps > MOST_SWEEPS[backend])
    assert bool(((weights >= 0) & (weights <= 1 + 1e-6)).all())
    rows = wrong.nonzero().flatten().tolist()
    described = [
        f"{names[i]}, k={k[i].item()!r}, epsilon={epsilon[i].item():g}: |sum T - k| = {error[i].item():.2g}, "
        f"residual {info.residual[i].item():.2g}, {info.sweeps[i].item()} sweeps"
        for i in rows[:20]
    ]
    assert not rows, f"{len(rows)} of {len(names)} rows of {n}:\n" + "\n".join(described)


@pytest.fixture
def compiled(backend: str, interpreted: bool) -> str:
    if interpreted:
        pytest.skip("backend triton: no GPU, and the interpreter takes minutes for this many rows")
    return backend


compiled_backends = pytest.mark.parametrize(
    "backend",
    ["cpu", pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("triton", marks=pytest.mark.gpu)],
    indirect=True,
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@compiled_backends
@dtypes
@pytest.mark.parametrize("n", [2, 7, 64, 500, 2500])
def test_every_family(n: int, dtype: torch.dtype, compiled: str, device: str) -> None:
    generator = torch.Generator().manual_seed(n)
    rows, ks, epsilons, names = [], [], [], []
    for name, family in FAMILIES.items():
        scores = family(torch.randn(n, generator=generator, dtype=torch.float64))
        for k in _choices_of_k(n):
            for epsilon in EPSILONS:
                rows.append(scores)
                ks.append(k)
                epsilons.append(epsilon)
                names.append(name)
    per_row = {"dtype": torch.float64, "device": device}
    k_rows, epsilon_rows = torch.tensor(ks, **per_row), torch.tensor(epsilons, **per_row)
    _assert_solved(torch.stack(rows).to(device, dtype), k_rows, epsilon_rows, names, compiled)


@compiled_backends
@dtypes
def test_a_million_entries(dtype: torch.dtype, compiled: str, device: str) -> None:
    n = 1_000_000
    generator = torch.Generator().manual_seed(1)
    cases = [("normal", 1e-4), ("clustered", 1e-2), ("one high outlier", 0.1)]
    rows = [FAMILIES[name](torch.randn(n, generator=generator, dtype=torch.float64)) for name, _ in cases]
    epsilon = torch.tensor([epsilon for _, epsilon in cases], dtype=torch.float64, device=device)
    k = torch.full_like(epsilon, 0.07 * n)
    _assert_solved(torch.stack(rows).to(device, dtype), k, epsilon, [name for name, _ in cases], compiled)


@compiled_backends
@pytest.mark.parametrize(
    ("dtype", "n", "epsilon", "tolerance"),
    [(torch.float32, 512, 0.1, 3e-7), (torch.float64, 4096, 1.0, 2e-15)],
    ids=["float32", "float64"],
)
def test_rows_of_spread_scores_with_a_near_first_guess(
    dtype: torch.dtype, n: int, epsilon: float, tolerance: float, compiled: str, device: str
) -> None:
    """The first guess is up to 0.4 (float64: 0.02) of tau away, about as far as the polynomial of degree 7 reaches."""
    scores = torch.randn(256, n, generator=torch.Generator().manual_seed(0)).sigmoid().to(device, dtype)
    weights, info = mf.soft_topk(scores, 0.4 * n, epsilon=epsilon, return_info=True, backend=compiled)
    torch.testing.assert_close(
        weights.cpu().double(), oracle.soft_topk(scores, 0.4 * n, epsilon), rtol=0, atol=tolerance
    )
    if compiled == "cpu" and _extension.cpu_isa() == "avx512":
        assert (info.sweeps == 2).double().mean() > 0.9  # the statistics, and one pass of sums

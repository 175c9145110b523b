"""The Triton soft top-k against float64 bisection in NumPy: under the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from mmer_fast.triton import soft_topk as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Absolute error of a weight: rounding of the output dtype, and of t = (s - lambda) / tau for tau = 0.1.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 6e-4,
}


@dataclass
class Problem:
    """Rows of scores with everything that the operator takes."""

    scores: Tensor  # [R, n]
    k: Tensor | float = 2.0
    tau: Tensor | float = 0.1
    lengths: Tensor | None = None
    mask: Tensor | None = None
    largest: bool = True
    sinkhorn_iterations: int = 0
    block_limit: int = kernels.BLOCK_LIMIT
    arguments: dict[str, Tensor | float | None] = field(init=False)

    def __post_init__(self) -> None:
        self.arguments = {}
        for name, value in (("k", self.k), ("tau", self.tau)):
            is_tensor = isinstance(value, Tensor)
            self.arguments[name] = value.double().to(DEVICE) if is_tensor else None
            self.arguments[f"{name}_value"] = 0.0 if is_tensor else value
        for name, tensor in (("lengths", self.lengths), ("mask", self.mask)):
            self.arguments[name] = None if tensor is None else tensor.to(DEVICE)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        outputs = kernels.soft_topk_forward(
            self.scores.to(DEVICE),
            **self.arguments,
            largest=self.largest,
            sinkhorn_iterations=self.sinkhorn_iterations,
            block_limit=self.block_limit,
        )
        return tuple(output.cpu() for output in outputs)

    def backward(self, grad_weights: Tensor, threshold: Tensor, grad_threshold: Tensor | None) -> tuple[Tensor, ...]:
        arguments = {name: value for name, value in self.arguments.items() if not name.startswith("k")}
        gradients = kernels.soft_topk_backward(
            grad_weights.to(DEVICE),
            self.scores.to(DEVICE),
            threshold.to(DEVICE),
            None if grad_threshold is None else grad_threshold.to(DEVICE),
            **arguments,
            largest=self.largest,
            block_limit=self.block_limit,
        )
        return tuple(gradient.cpu() for gradient in gradients)

    def rows(self) -> list[tuple[np.ndarray, np.ndarray, float, float]]:
        """Each row's (valid columns, ordered scores x = sign * s there, k, tau) in float64."""
        rows, cols = self.scores.shape
        valid = torch.ones(rows, cols, dtype=torch.bool) if self.mask is None else self.mask
        if self.lengths is not None:
            valid = valid & (torch.arange(cols) < self.lengths[:, None])
        k = torch.as_tensor(self.k, dtype=torch.float64).expand(rows)
        tau = torch.as_tensor(self.tau, dtype=torch.float64).expand(rows)
        sign = 1.0 if self.largest else -1.0
        found = []
        for row in range(rows):
            columns = np.flatnonzero(valid[row].numpy())
            found.append((columns, sign * self.scores[row].double().numpy()[columns], float(k[row]), float(tau[row])))
        return found


def logistic(t: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(t))
    return np.where(t >= 0, 1 / (1 + e), e / (1 + e))


def bisect(x: np.ndarray, k: float, tau: float) -> float:
    """lambda with sum sigma((x - lambda) / tau) = k, to the last bit of float64."""
    low, high = x.min() - 800 * tau, x.max() + 800 * tau
    while low < (middle := 0.5 * (low + high)) < high:
        if logistic((x - middle) / tau).sum() > k:
            low = middle
        else:
            high = middle
    return high


def expected(problem: Problem) -> tuple[Tensor, Tensor]:
    """Weights and thresholds of rows that have a root."""
    weights = torch.zeros(problem.scores.shape, dtype=torch.float64)
    threshold = torch.zeros(len(weights), dtype=torch.float64)
    for row, (columns, x, k, tau) in enumerate(problem.rows()):
        root = bisect(x, k, tau)
        weights[row, torch.from_numpy(columns)] = torch.from_numpy(logistic((x - root) / tau))
        threshold[row] = root if problem.largest else -root
    return weights, threshold


def check_forward(problem: Problem, max_sweeps: int = 10) -> None:
    weights, threshold, certificate = problem.forward()
    reference, root = expected(problem)
    assert weights.dtype == problem.scores.dtype
    assert weights.is_contiguous()
    tau = torch.as_tensor(problem.tau, dtype=torch.float64)
    rounding = 1e-15 / tau.min().item()  # of the reference's own root, in units of t
    torch.testing.assert_close(weights.double(), reference, rtol=0, atol=TOLERANCE[weights.dtype] + rounding)
    steepest = (reference * (1 - reference)).amax(1)
    slack = 10 * TOLERANCE[torch.float64 if weights.dtype == torch.float64 else torch.float32]
    assert ((threshold - root).abs() * steepest <= slack * (tau + root.abs())).all()
    k = torch.as_tensor(problem.k, dtype=torch.float64)
    precision = 1e-13 if weights.dtype == torch.float64 else 1e-6
    assert (certificate[:, 0].abs() <= precision * (1 + k)).all()
    assert (certificate[:, 1] <= max_sweeps).all()


def normal(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("cols", [1, 7, 50, 129, 1134])
def test_values_by_row_length(cols: int) -> None:
    check_forward(Problem(normal(3, cols), k=0.37 * cols))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_values_by_dtype(dtype: torch.dtype) -> None:
    check_forward(Problem(normal(3, 50, dtype=dtype), k=12.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [0.3, 2e-4])
def test_rows_read_in_chunks(dtype: torch.dtype, tau: float) -> None:
    lengths = torch.tensor([150, 77])
    check_forward(Problem(normal(2, 150, dtype=dtype), k=30.25, tau=tau, lengths=lengths, block_limit=64))


def test_the_selection_serves_staircases() -> None:
    scores = normal(4, 60, dtype=torch.float64)
    check_forward(Problem(scores, k=17.3, tau=1e-6))
    check_forward(Problem(scores.round(decimals=1), k=17.0, tau=1e-4))


@pytest.mark.parametrize("block_limit", [4096, 32])
@pytest.mark.parametrize("largest", [True, False])
def test_ragged_rows_with_a_mask_and_parameters_of_their_own(largest: bool, block_limit: int) -> None:
    scores = normal(4, 50)
    mask = normal(4, 50, seed=1) > -0.5
    k = torch.tensor([1.5, 3.0, 10.0, 20.25])
    tau = torch.tensor([0.05, 0.1, 1.0, 0.2])
    scores[~mask] = float("nan")
    check_forward(Problem(scores, k=k, tau=tau, mask=mask, largest=largest, block_limit=block_limit))


def test_padding_and_strides_never_matter() -> None:
    lengths = torch.tensor([50, 3, 20, 10])
    wide = torch.full((4, 64), float("nan"))
    wide[:, 3:53] = normal(4, 50)
    scores = wide[:, 3:53]
    scores[torch.arange(50) >= lengths[:, None]] = float("inf")
    problem = Problem(scores, k=2.5, lengths=lengths)
    check_forward(problem)
    grad = torch.full((4, 50), float("nan"))
    grad[torch.arange(50) < lengths[:, None]] = 1.0
    gradient, grad_k, grad_tau = problem.backward(grad, problem.forward()[1], None)
    # T sums to k, so the gradient of sum T is that of k
    torch.testing.assert_close(gradient, torch.zeros(4, 50), rtol=0, atol=1e-5)
    torch.testing.assert_close(grad_k, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(grad_tau, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("block_limit", [4096, 32])
@pytest.mark.parametrize("iterations", [1, 5])
def test_sinkhorn_is_the_scaling_of_two_columns(iterations: int, block_limit: int) -> None:
    problem = Problem(
        normal(2, 40, dtype=torch.float64), k=7.5, tau=0.2, sinkhorn_iterations=iterations, block_limit=block_limit
    )
    weights, _, certificate = problem.forward()
    for row, (_, x, k, tau) in enumerate(problem.rows()):
        # cost (s - anchor)^2 / Z with epsilon Z = 2 tau; u on the rows, v on the anchors 0 and 1
        kernel = np.exp(-np.stack([x**2, (x - 1) ** 2], axis=1) / (2 * tau))
        v = np.full(2, 0.5)
        for _ in range(iterations):
            u = (1 / len(x)) / (kernel @ v)
            v = np.array([1 - k / len(x), k / len(x)]) / (kernel.T @ u)
        plan = torch.from_numpy(len(x) * u * kernel[:, 1] * v[1])
        torch.testing.assert_close(weights[row], plan, rtol=0, atol=1e-12)
        assert weights[row].sum().item() == pytest.approx(k, abs=1e-12)
    assert (certificate[:, 1] == iterations + 1).all()


@pytest.mark.parametrize("block_limit", [4096, 16])
def test_rows_without_a_root(block_limit: int) -> None:
    inf, nan = float("inf"), float("nan")
    scores = normal(8, 20)
    scores[3, 4:] = -inf
    scores[4, 5] = nan
    scores[5, 5] = inf
    k = torch.tensor([0.0, 20.0, 21.0, 10.0, 3.0, 3.0, nan, -1.0])
    weights, threshold, certificate = Problem(scores, k=k, block_limit=block_limit).forward()
    assert (weights[0] == 0).all()
    assert threshold[0] == inf
    assert (weights[1] == 1).all()
    assert threshold[1] == -inf
    assert weights[3].tolist() == [1.0] * 4 + [0.0] * 16
    assert certificate[[0, 1, 3], 0].tolist() == [0.0, 0.0, -6.0]
    for row in (2, 4, 5, 6, 7):
        assert weights[row].isnan().all()
        assert threshold[row].isnan()
        assert certificate[row, 0].isnan()
    gradients = Problem(scores, k=k, block_limit=block_limit).backward(torch.ones(8, 20), threshold, torch.ones(8))
    assert all((gradient == 0).all() for gradient in gradients)


def test_minus_infinity_takes_nothing() -> None:
    scores = normal(2, 30)
    scores[0, ::3] = -float("inf")
    weights, threshold, _ = Problem(scores, k=5.5).forward()
    assert (weights[0, ::3] == 0).all()
    assert weights[0].sum().item() == pytest.approx(5.5, abs=1e-5)
    gradient, *_ = Problem(scores, k=5.5).backward(normal(2, 30, seed=2), threshold, None)
    assert gradient.isfinite().all()
    assert (gradient[0, ::3] == 0).all()


def test_ties_share_equally() -> None:
    scores = torch.zeros(2, 12)
    scores[0, :2] = 5.0
    scores[1] = -0.0
    scores[1, ::2] = 0.0
    weights, _, certificate = Problem(scores, k=4.0, tau=1e-3).forward()
    torch.testing.assert_close(weights[0], torch.tensor([1.0] * 2 + [0.2] * 10))
    torch.testing.assert_close(weights[1], torch.full((12,), 1 / 3))
    assert (certificate[:, 1] <= 10).all()


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (2, 0)])
def test_nothing_to_choose_from(rows: int, cols: int) -> None:
    problem = Problem(torch.zeros(rows, cols), k=0.0)
    weights, threshold, certificate = problem.forward()
    assert weights.shape == (rows, cols)
    assert (threshold == float("inf")).all()
    assert (certificate == 0).all()
    gradient, grad_k, grad_tau = problem.backward(weights, threshold, None)
    assert gradient.shape == (rows, cols)
    assert (grad_k == 0).all()
    assert (grad_tau == 0).all()


def loss(problem: Problem, row: int, x: np.ndarray, k: float, tau: float, g: np.ndarray, g_threshold: float) -> float:
    root = bisect(x, k, tau)
    sign = 1.0 if problem.largest else -1.0
    return float(g @ logistic((x - root) / tau) + g_threshold * sign * root)


@pytest.mark.parametrize("block_limit", [4096, 8])
@pytest.mark.parametrize("largest", [True, False])
def test_gradients_against_finite_differences(largest: bool, block_limit: int) -> None:
    scores = normal(2, 13, dtype=torch.float64)
    lengths = torch.tensor([13, 9])
    tau = torch.tensor([0.5, 0.3], dtype=torch.float64)
    problem = Problem(scores, k=4.5, tau=tau, lengths=lengths, largest=largest, block_limit=block_limit)
    grad_weights = normal(2, 13, seed=3, dtype=torch.float64)
    grad_threshold = torch.tensor([0.7, -0.4], dtype=torch.float64)
    gradient, grad_k, grad_tau = problem.backward(grad_weights, problem.forward()[1], grad_threshold)
    sign = 1.0 if largest else -1.0
    h = 1e-5
    for row, (columns, x, k, t) in enumerate(problem.rows()):
        g, gt = grad_weights[row].numpy()[columns], float(grad_threshold[row])

        def slope(step_x: np.ndarray, step_k: float, step_t: float, row=row, x=x, k=k, t=t, g=g, gt=gt) -> float:
            up = loss(problem, row, x + h * step_x, k + h * step_k, t + h * step_t, g, gt)
            down = loss(problem, row, x - h * step_x, k - h * step_k, t - h * step_t, g, gt)
            return (up - down) / (2 * h)

        none = np.zeros_like(x)
        numeric = np.zeros(13)
        numeric[columns] = [sign * slope(unit, 0, 0) for unit in np.eye(len(x))]
        np.testing.assert_allclose(gradient[row].numpy(), numeric, rtol=0, atol=1e-8)
        assert grad_k[row].item() == pytest.approx(slope(none, 1, 0), abs=1e-8)
        assert grad_tau[row].item() == pytest.approx(slope(none, 0, 1), abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_a_low_precision_follow_float64(dtype: torch.dtype) -> None:
    scores = normal(3, 50, dtype=dtype)
    grad = normal(3, 50, seed=4, dtype=dtype)
    exact = Problem(scores.double(), k=12.5, tau=0.3)
    low = Problem(scores, k=12.5, tau=0.3)
    reference = exact.backward(grad.double(), exact.forward()[1], None)
    gradients = low.backward(grad, low.forward()[1], None)
    assert gradients[0].dtype == dtype
    assert gradients[1].dtype == torch.float64
    for gradient, wanted in zip(gradients, reference, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_two_runs_give_the_same_bits() -> None:
    problem = Problem(normal(3, 129), k=40.5)
    for first, second in zip(problem.forward(), problem.forward(), strict=True):
        assert torch.equal(first, second)

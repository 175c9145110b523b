"""Forward values against an independent float64 oracle, on every backend: dtypes, strides, ragged rows, Sinkhorn."""

from __future__ import annotations

import pytest
import soft_topk_oracle as oracle
import torch
from op_tolerances import WEIGHT

import mmer_fast as mf

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def scores_of(rows: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(weights: torch.Tensor, expected: torch.Tensor) -> None:
    assert weights.isfinite().all()
    assert (weights.double().cpu() - expected).abs().max() <= WEIGHT[weights.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 129, 1134])
@pytest.mark.parametrize("largest", [True, False])
def test_equals_the_oracle(backend, device, interpreted, dtype, n, largest):
    if interpreted and (n == 1134 or dtype == torch.float16):
        n = 50
    scores = scores_of(3, n, dtype)
    k = 0.4 * n
    weights = mf.soft_topk(scores.to(device), k, largest=largest, backend=backend)
    assert weights.dtype == dtype
    assert weights.shape == scores.shape
    check(weights, oracle.soft_topk(scores, k, largest=largest))


@pytest.mark.parametrize("epsilon", [1e-4, 1e-2, 1.0, 10.0])
def test_over_temperatures(backend, device, interpreted, epsilon):
    scores = scores_of(2, 33 if interpreted else 500, torch.float32)
    for k in (1, 7.25, 20):
        weights = mf.soft_topk(scores.to(device), k, epsilon=epsilon, backend=backend)
        check(weights, oracle.soft_topk(scores, k, epsilon))


def test_k_and_epsilon_per_row(backend, device):
    scores = scores_of(4, 20)
    k = torch.tensor([0.0, 3.5, 7, 20], dtype=torch.float64)
    epsilon = torch.tensor([0.1, 0.02, 1.0, 0.5], dtype=torch.float32)
    weights = mf.soft_topk(scores.to(device), k.to(device), epsilon=epsilon.to(device), backend=backend)
    check(weights, oracle.soft_topk(scores, k, epsilon))


def test_integer_k_tensor_and_batch_dimensions(backend, device):
    scores = scores_of(6, 11).reshape(2, 3, 11)
    k = torch.tensor([1, 4, 7])  # broadcasts to (2, 3)
    weights, info = mf.soft_topk(scores.to(device), k.to(device), return_info=True, backend=backend)
    expected = oracle.soft_topk(scores.reshape(6, 11), k.repeat(2).double()).reshape(2, 3, 11)
    check(weights, expected)
    assert info.threshold.shape == info.residual.shape == info.sweeps.shape == (2, 3)
    assert mf.soft_topk(scores[0, 0].to(device), 4, backend=backend).shape == (11,)


@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ragged_rows_with_nan_in_the_padding(backend, device, use_mask, dtype):
    scores = scores_of(5, 40, dtype)
    lengths = torch.tensor([40, 17, 1, 0, 33])
    k = 0.4 * lengths.double()
    if use_mask:
        mask = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)) < 0.6
        k, where = 0.4 * mask.sum(-1).double(), {"mask": mask}
    else:
        mask = torch.arange(40) < lengths[:, None]
        where = {"lengths": lengths}
    poisoned = scores.masked_fill(~mask, torch.nan)
    weights = mf.soft_topk(
        poisoned.to(device), k.to(device), **{a: b.to(device) for a, b in where.items()}, backend=backend
    )
    check(weights, oracle.soft_topk(scores, k, **where))
    assert (weights.cpu()[~mask] == 0).all()


def test_strides_and_offsets(backend, device):
    base = scores_of(9, 40).to(device)
    k = 5
    for view in (base[1::2, 3:30], base.t()[:9, :7], base[:, ::3], base[2:3].expand(4, 40), base[:, 5]):
        weights = mf.soft_topk(view, k, backend=backend)
        check(weights, mf.soft_topk(view.contiguous(), k, backend="reference").cpu().double())


def test_certificate(backend, device, interpreted):
    scores = scores_of(4, 60 if interpreted else 300, torch.float32)
    weights, info = mf.soft_topk(scores.to(device), 20, return_info=True, backend=backend)
    assert info.threshold.dtype == info.residual.dtype == torch.float64
    assert info.sweeps.dtype == torch.int64
    expected = torch.sigmoid((scores.double() - info.threshold.cpu()[:, None]) / 0.05)
    assert (weights.cpu().double() - expected).abs().max() < 1e-6
    assert info.residual.abs().max() <= 1e-5
    if backend != "reference":
        assert info.sweeps.max() <= 10
    assert info.sweeps.min() >= 1


def test_same_bits_every_time(backend, device):
    scores = scores_of(7, 65, torch.float32).to(device)
    first = mf.soft_topk(scores, 20, backend=backend)
    assert all(torch.equal(first, mf.soft_topk(scores, 20, backend=backend)) for _ in range(3))


def test_low_precision_is_as_good_as_plain_pytorch(backend, device, interpreted):
    """The error of bf16 is at most twice that of rounding the exact weights to bf16."""
    if interpreted:
        pytest.skip("Triton's interpreter truncates to bf16 where a GPU rounds")
    scores = scores_of(4, 50, torch.bfloat16)
    expected = oracle.soft_topk(scores, 20.0)
    weights = mf.soft_topk(scores.to(device), 20, backend=backend)
    rounding = (expected.bfloat16().double() - expected).abs().max()
    assert (weights.cpu().double() - expected).abs().max() <= 2 * rounding


class TestSinkhorn:
    @pytest.mark.parametrize("iterations", [1, 2, 5, 100])
    @pytest.mark.parametrize("largest", [True, False])
    @pytest.mark.parametrize("normalizer", [1.0, "max"])
    def test_equals_the_matrix_form(self, backend, device, interpreted, iterations, largest, normalizer):
        scores = torch.sigmoid(3 * scores_of(3, 17 if interpreted else 60))
        k = 0.4 * scores.shape[1]
        expected = oracle.matrix_sinkhorn(
            scores, k, 0.1, iterations, anchor=int(largest), normalize=normalizer == "max"
        )
        weights = mf.soft_topk(
            scores.to(device),
            k,
            largest=largest,
            normalizer=normalizer,
            solver="sinkhorn",
            iterations=iterations,
            backend=backend,
        )
        assert (weights.cpu() - expected).abs().max() <= 1e-12

    def test_converges_to_newton(self, backend, device):
        scores = scores_of(3, 20, torch.float32).to(device)
        sinkhorn = mf.soft_topk(scores, 6, epsilon=2.0, solver="sinkhorn", iterations=60, backend=backend)
        newton = mf.soft_topk(scores, 6, epsilon=2.0, backend=backend)
        assert (sinkhorn - newton).abs().max() <= 2e-6

    def test_extreme_temperatures_stay_finite(self, backend, device):
        scores = scores_of(2, 12, torch.float32).to(device)
        for epsilon in (1e-3, 100.0):
            weights = mf.soft_topk(scores, 4, epsilon=epsilon, solver="sinkhorn", iterations=20, backend=backend)
            assert weights.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("iterations", [1, 2, 5])
    def test_scores_far_on_one_side_of_the_anchors(self, backend, device, dtype, iterations):
        """Every T, or every 1 - T, of the first iterate underflows in float32."""
        scores = 0.02 * scores_of(2, 12, torch.float64) + torch.tensor([[-4.0], [5.0]])
        options = {"epsilon": 0.02, "solver": "sinkhorn", "iterations": iterations, "return_info": True}
        expected, exact = mf.soft_topk(scores.to(dtype).double(), 4, backend="reference", **options)
        weights, info = mf.soft_topk(scores.to(device, dtype), 4, backend=backend, **options)
        unit = 1e-11 if dtype == torch.float64 else 2e-4  # t is about 500 here, and rounded
        assert (weights.cpu().double() - expected).abs().max() <= unit
        assert (info.threshold.cpu() - exact.threshold).abs().max() <= unit
        assert (info.residual.cpu() - exact.residual).abs().max() <= 12 * unit


def test_normalizer_max_ignores_padding(backend, device):
    scores = scores_of(2, 10)
    lengths = torch.tensor([10, 6])
    scores[1, 6:] = 1e6
    weights = mf.soft_topk(scores.to(device), 3, lengths=lengths.to(device), normalizer="max", backend=backend)
    valid = torch.arange(10) < lengths[:, None]
    z = torch.maximum(scores**2, (scores - 1) ** 2)[valid].max()
    check(weights, oracle.soft_topk(scores, 3, 0.1 * float(z), lengths=lengths))

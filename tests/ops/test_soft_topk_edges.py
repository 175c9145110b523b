"""Every edge of the definition, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

import mmer_fast as mf

INF = math.inf


def row(backend, device, values, k, dtype=torch.float32, **options):
    scores = torch.tensor([values], dtype=dtype, device=device)
    weights, info = mf.soft_topk(scores, k, return_info=True, backend=backend, **options)
    return weights[0].cpu(), float(info.threshold[0]), float(info.residual[0])


def test_k_zero_takes_nothing(backend, device):
    weights, threshold, residual = row(backend, device, [1.0, 2.0, 3.0], 0)
    assert weights.tolist() == [0, 0, 0]
    assert threshold == INF
    assert residual == 0


def test_k_n_takes_everything(backend, device):
    weights, threshold, residual = row(backend, device, [1.0, 2.0, 3.0], 3)
    assert weights.tolist() == [1, 1, 1]
    assert threshold == -INF
    assert residual == 0


def test_fractional_k(backend, device):
    weights, _, residual = row(backend, device, [0.1, 0.7, -0.3, 0.2], 1.5, torch.float64)
    assert abs(float(weights.sum()) - 1.5) < 1e-12
    assert abs(residual) < 1e-12


@pytest.mark.parametrize("k", [1e-6, 2 - 1e-6])
def test_k_next_to_the_ends(backend, device, k):
    weights, _, _ = row(backend, device, [0.3, 0.1], k, torch.float64, epsilon=1.0)
    assert abs(float(weights.sum()) - k) < 1e-12
    assert ((weights > 0) & (weights < 1)).all()


@pytest.mark.parametrize("epsilon", [1e-4, 0.1, 10.0])
def test_ties_share(backend, device, epsilon):
    weights, _, _ = row(backend, device, [0.5] * 8, 3, epsilon=epsilon)
    assert (weights - 3 / 8).abs().max() <= 1e-6
    weights, _, _ = row(backend, device, [9.0, 0.5, 0.5, -7.0, 0.5], 2, epsilon=1e-3)
    assert (weights - torch.tensor([1, 1 / 3, 1 / 3, 0, 1 / 3])).abs().max() <= 1e-6


def test_minus_infinity_gets_nothing(backend, device):
    weights, _, _ = row(backend, device, [-INF, 0.2, 0.1, -INF], 1)
    assert weights[0] == weights[3] == 0
    assert abs(float(weights.sum()) - 1) < 1e-6
    weights, _, residual = row(backend, device, [-INF, 0.2, 0.1, -INF], 3)  # more than can be had
    assert weights.tolist() == [0, 1, 1, 0]
    assert residual == -1
    weights, _, _ = row(backend, device, [INF, 0.2, 0.1], 1, largest=False)
    assert weights[0] == 0


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nan_and_plus_infinity_make_a_nan_row_and_no_other(backend, device, bad):
    scores = torch.randn(3, 6, device=device)
    scores[1, 2] = bad
    weights, info = mf.soft_topk(scores, 2, return_info=True, backend=backend)
    assert weights[1].isnan().all()
    assert info.threshold[1].isnan()
    assert weights[[0, 2]].isfinite().all()
    scores.requires_grad_()
    (g,) = torch.autograd.grad(mf.soft_topk(scores, 2, backend=backend).nan_to_num().sum(), scores)
    assert g[[0, 2]].isfinite().all()


def test_checked_mode_names_the_row(backend, device):
    scores = torch.randn(3, 6, device=device)
    scores[1, 2] = math.nan
    with mf.checked(), pytest.raises(ValueError, match=r"scores .* row 1"):
        mf.soft_topk(scores, 2, backend=backend)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (2, 3, 0), (0,)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty(backend, device, shape, masked):
    scores = torch.zeros(shape, device=device, requires_grad=True)
    mask = torch.ones(shape, dtype=torch.bool, device=device) if masked else None
    weights, info = mf.soft_topk(scores, 0, mask=mask, return_info=True, backend=backend)
    assert weights.shape == shape
    assert info.threshold.shape == shape[:-1]
    weights.sum().backward()
    assert scores.grad.shape == shape


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_one_entry(backend, device, k):
    weights, _, _ = row(backend, device, [-3e5], k, epsilon=1e-3)
    assert abs(float(weights[0]) - k) <= 1e-6


def test_rows_of_length_zero(backend, device):
    scores = torch.full((2, 4), math.nan, device=device)
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    weights = mf.soft_topk(scores, 0, lengths=lengths, backend=backend)
    assert torch.equal(weights.cpu(), torch.zeros(2, 4))


def test_huge_and_tiny_scores(backend, device):
    for scale in (1e30, 1e-30):
        weights, _, _ = row(backend, device, [3 * scale, scale, 2 * scale], 2, epsilon=0.1 * scale)
        assert abs(float(weights.sum()) - 2) < 1e-5
        assert weights.isfinite().all()
    weights, _, _ = row(backend, device, [1e9, 0.3, 0.1, -1e9], 2, epsilon=1e-2)
    assert weights.tolist() == pytest.approx([1, 1, 0, 0], abs=1e-6)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-17, 1e-25, 1e-40, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_at_any_temperature(backend, device, interpreted, dtype, epsilon):
    """A group of equal scores, the largest of all or not, shares what is left for it, however far away the rest is."""
    k = torch.tensor([3.0, 3.5] if interpreted else [0.01, 1.0, 3.0, 3.5, 20.0, 35.0], device=device)
    rest = torch.linspace(-2, 2, 10).expand(len(k), 10)
    for tied in (2.5,) if interpreted else (2.5, 0.1):
        scores = torch.cat([torch.full((len(k), 30), tied), rest], -1).to(device, dtype).requires_grad_()
        weights, info = mf.soft_topk(scores, k, epsilon=epsilon, return_info=True, backend=backend)
        above = (rest[0] > tied).sum()
        share = ((k.cpu() - above) / 30).clamp(0, 1).to(dtype)
        torch.testing.assert_close(weights[:, :30].cpu(), share[:, None].expand(len(k), 30), rtol=0, atol=1e-6)
        torch.testing.assert_close(weights.sum(-1).cpu(), k.cpu().to(dtype), rtol=1e-6, atol=1e-6)
        assert bool((info.sweeps <= 10).all()) or backend == "reference"
        (gradient,) = torch.autograd.grad((weights * weights.detach()).sum(), scores)
        assert not gradient.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_high_temperature_shares_equally(backend, device, dtype):
    for epsilon in (1e30, 3e38, 1e300):
        scores = torch.tensor([[0.5, -2.0, 1.0]], dtype=dtype, device=device, requires_grad=True)
        weights = mf.soft_topk(scores, 0.2, epsilon=epsilon, backend=backend)
        torch.testing.assert_close(weights, torch.full_like(weights, 0.2 / 3), rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(weights.square().sum(), scores)
        assert gradient.abs().max() <= 1e-28


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [6e-202, 1e-100, 1e-60])
@pytest.mark.parametrize("top", [1.5, 3e38])
def test_thresholds_beyond_all_floats(backend, device, top, k, largest):
    """lambda is s - tau logit(k/n), of which float32 holds neither the threshold nor, for large scores, distances."""
    sign = 1 if largest else -1
    scores = (sign * torch.tensor([[1.0, top, 1.2]], device=device)).requires_grad_()
    numbers = [torch.tensor([x], dtype=torch.float64, device=device, requires_grad=True) for x in (k, 3e38)]
    weights, info = mf.soft_topk(
        scores, numbers[0], epsilon=numbers[1], largest=largest, return_info=True, backend=backend
    )
    # The solver ends between thresholds of which one has weights of 0, the next one of the smallest subnormal: which of
    # them it returns is a matter of rounding.
    assert float(weights.detach().max()) <= 1.5e-45
    assert sign * float(info.threshold.detach()) > 1e38
    assert float(info.residual.detach()) == pytest.approx(0, abs=1.5e-45)
    for gradient in torch.autograd.grad((weights * torch.arange(3, device=device)).sum(), (scores, *numbers)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("rows", [1])
def test_a_million_entries(backend, device, interpreted, rows):
    n = 20_000 if interpreted else 1_000_000
    scores = torch.randn(rows, n, generator=torch.Generator().manual_seed(0)).to(device)
    weights, info = mf.soft_topk(scores, 0.4 * n, return_info=True, backend=backend)
    assert abs(float(weights.double().sum()) - 0.4 * n) <= 1e-6 * n
    assert float(info.residual.abs().max()) <= 1e-5 * n


def test_k_out_of_range_on_a_gpu_is_a_nan_row(backend, device):
    """Without a host synchronisation nobody can raise; the rows operator says NaN on every device."""
    scores = torch.randn(3, 5, device=device)
    k = torch.tensor([2.0, 7.0, -1.0], dtype=torch.float64, device=device)
    from mmer_fast.ops.soft_topk import _rows_forward

    weights, threshold, _ = _rows_forward(backend, scores, k, math.nan, None, 0.05, None, None, True, 0)
    assert weights[0].isfinite().all()
    assert weights[1:].isnan().all()
    assert threshold[1:].isnan().all()

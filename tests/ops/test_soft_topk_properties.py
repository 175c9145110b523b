"""The mathematics, with hypothesis: sum, order, shift, permutation, duality, scale."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mmer_fast as mf
from mmer_fast.ops import _backends

BACKENDS = [name for name in ("reference", "cpu") if _backends.unavailable_reason(name, "cpu") is None]

rows = arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 40)),
    elements=st.floats(-50, 50, allow_nan=False, width=32),
)
share = st.floats(0, 1)
epsilon = st.floats(1e-3, 10)
backend = st.sampled_from(BACKENDS)
common = settings(max_examples=60, deadline=None)


def solve(s: np.ndarray, k: float, eps: float, name: str, **options) -> torch.Tensor:
    return mf.soft_topk(torch.from_numpy(np.ascontiguousarray(s)), k, epsilon=eps, backend=name, **options)


@common
@given(rows, share, epsilon, backend)
def test_sums_to_k_within_zero_and_one(s, p, eps, name):
    k = p * s.shape[1]
    weights = solve(s, k, eps, name)
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (weights.sum(-1) - k).abs().max() <= 1e-9 * s.shape[1]


@common
@given(rows, share, epsilon, backend)
def test_keeps_the_order_of_the_scores(s, p, eps, name):
    order = np.sort(s, axis=-1)
    weights = solve(order, p * s.shape[1], eps, name)
    assert (weights.diff(dim=-1) >= -1e-12).all()


@common
@given(rows, share, epsilon, backend, st.floats(-100, 100))
def test_a_constant_changes_nothing(s, p, eps, name, shift):
    k = p * s.shape[1]
    assert torch.allclose(solve(s + shift, k, eps, name), solve(s, k, eps, name), atol=1e-9 / eps)


@common
@given(rows, share, epsilon, backend, st.randoms(use_true_random=False))
def test_permutes_with_the_scores(s, p, eps, name, random):
    order = list(range(s.shape[1]))
    random.shuffle(order)
    k = p * s.shape[1]
    assert torch.allclose(solve(s[:, order], k, eps, name), solve(s, k, eps, name)[:, order], atol=1e-10)


@common
@given(rows, share, epsilon, backend)
def test_the_smallest_are_what_the_largest_leave(s, p, eps, name):
    k = p * s.shape[1]
    left = 1 - solve(s, k, eps, name)
    assert torch.allclose(solve(s, s.shape[1] - k, eps, name, largest=False), left, atol=1e-10)


@common
@given(rows, share, epsilon, backend, st.floats(0.1, 10))
def test_scores_and_epsilon_scale_together(s, p, eps, name, scale):
    k = p * s.shape[1]
    assert torch.allclose(solve(s * scale, k, eps * scale, name), solve(s, k, eps, name), atol=1e-8)


@common
@given(st.lists(st.integers(-3000, 3000), min_size=1, max_size=40, unique=True), st.data())
def test_small_epsilon_is_the_hard_top_k(hundredths, data):
    s = np.array([hundredths]) / 100.0
    k = data.draw(st.integers(0, s.shape[1]))
    hard = np.zeros_like(s)
    hard[0, np.argsort(-s[0])[:k]] = 1
    for name in BACKENDS:
        assert torch.allclose(solve(s, k, 1e-4, name), torch.from_numpy(hard), atol=1e-9)


@common
@given(rows, share, epsilon)
def test_backends_agree(s, p, eps):
    results = [solve(s, p * s.shape[1], eps, name) for name in BACKENDS]
    assert all(torch.allclose(results[0], other, atol=1e-10) for other in results)
